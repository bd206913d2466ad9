"""Replicas that are found rather than written down: looked for, kept, and made a part of the configuration."""
