"""Finding replicas that nobody has written down: each source tells, whenever it changes, what it has found."""
