"""Load tests: a scriptable fake engine, load generators and the benchmark runner. Not installed."""
