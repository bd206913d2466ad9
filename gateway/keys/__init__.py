"""Who calls: API keys, the tenants they belong to, and the directory that knows them all without asking a database."""
