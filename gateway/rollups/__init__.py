"""Rollups: the overview and live events, as routes."""
