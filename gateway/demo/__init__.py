"""`tidegate demo`: a real model answering through the gateway, from nothing but the installed packages.

    preflight   what would make the demo fail, found before anything is started
    child       one process of ours: its log, its end, and how to end it
    fleet       the replicas and the gateway in front of them, kept running
    welcome     what the terminal says once a real answer has come
    command     the order of it all, signals and exit codes

There is no fake anywhere in here: without the engine and the weights the demo says what is missing and ends.
"""

from gateway.demo.command import run

__all__ = ["run"]
