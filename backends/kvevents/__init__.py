"""What engines publish about their KV caches, read as it comes and never taken for more than it proves."""
