"""Steering: overrides of the configuration, policies and reloads, as routes."""
