"""Commands of `tidegate` that ask a running gateway, by what they are about."""
