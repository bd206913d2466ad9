"""Talking to model servers: the lean HTTP client, its errors, and what is built on top of them.

Imports run one way: `gateway` uses `backends`, `backends` uses `routing`, and nothing goes back.
"""
