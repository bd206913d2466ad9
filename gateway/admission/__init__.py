"""Lets requests in: reserves what they should use, finds them a place at their pool, and settles afterwards."""
