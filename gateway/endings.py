"""How a process ended, in words."""

from __future__ import annotations

import signal


def how_it_ended(code: int) -> str:
    """The end of a sentence, from an exit code as `subprocess` has it: below zero, the number of a signal.

    >>> how_it_ended(-9), how_it_ended(3)
    ('was ended by SIGKILL', 'ended with exit code 3')
    """
    return f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
