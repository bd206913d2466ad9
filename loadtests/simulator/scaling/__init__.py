"""A simulator of days of a pool whose size changes: coarser than that of requests, and a thousand times as fast.

It holds no single requests but how many run and how many came in each second and wait. `tests/loadtests/simulator`
compares it with the simulator that does hold them.
"""
