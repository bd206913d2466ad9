"""`tidegate fleet up`: starts a pool's servers on this machine, keeps them running, and does what the gateway asks.

`keeping` decides about one server and `crew` about those of one pool; both are plain code without a clock, a process or
a socket. `server`, `links` and `agent` carry it out.
"""
