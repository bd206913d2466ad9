"""What the gateway tells OpenTelemetry: spans of requests and attempts, the trace that engines go on with, metrics.

Nothing here is made, and no library of OpenTelemetry's imported, where `telemetry.endpoint` is not configured. A
request only carries its ids (`context`, chosen by `tracing`); spans are built from its record after it has settled
(`spans`) and sent by a thread (`export`). `metrics` and `genai` do the same for the figures of `/metrics`.
"""
