"""What a caller may use: which limits apply to a request, what it is expected to take, and what the client is told."""
