"""Keys, tenants, spend of record and the audit: what must survive anything, in a SQLite file or in PostgreSQL.

Synchronous, and safe to use from several threads: callers in an event loop go through `asyncio.to_thread`. Never read
on the path of a request. `database` brings in SQLAlchemy and is imported only where one is opened; `errors`, `answers`
and `address` cost nothing.
"""
