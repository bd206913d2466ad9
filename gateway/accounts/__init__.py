"""Accounts: limits, headroom and cost, as routes."""
