"""Inspection: requests under way and past ones, and the playground, as routes."""
