"""The store of several gateway processes and nodes: one Redis, and Lua scripts that are whole operations.

Imported only when a gateway is configured with Redis.
"""
