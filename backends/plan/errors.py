"""What can be wrong with a question to the plan."""

from __future__ import annotations


class PlanError(Exception):
    """There is no answer; the message names the field or the word that is in the way."""
