"""Keeps what a worker believes about its replicas true: what requests showed, what probes and engines say."""
