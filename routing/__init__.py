"""Pure routing decisions: types, health marks and policies.

Nothing in this package reads a clock, opens a socket or talks to a store; time and randomness are arguments.
It imports the standard library only (and xxhash, once prefixes are hashed), which import-linter holds.
"""
