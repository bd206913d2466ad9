"""Scaling: workers tell what their pools are asked for, one gateway decides, and a provider acts on it.

    worker ──DemandBook──▶ demand/<pool>/<worker> ──┐
    worker ──DemandBook──▶ demand/<pool>/<worker> ──┴▶ ScalingService ──▶ routing.scaling.Scaler ──▶ Provider

How many there should be is `routing.scaling`'s to say, and `docs/scaling.md`'s to explain.
"""
