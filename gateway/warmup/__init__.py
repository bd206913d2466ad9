"""What a replica gets before its first request: the prompt beginnings and adapters that are most used."""
