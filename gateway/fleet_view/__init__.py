"""The fleet as the dashboard shows it, as routes."""
