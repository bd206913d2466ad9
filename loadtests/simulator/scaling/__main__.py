"""`python -m loadtests.simulator.scaling`."""

from loadtests.simulator.scaling.command import main

if __name__ == "__main__":
    raise SystemExit(main())
