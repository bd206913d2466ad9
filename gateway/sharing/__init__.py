"""Lets the workers of a gateway route as one: what each does and learns reaches the others within milliseconds."""
