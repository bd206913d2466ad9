"""The HTTP face of Tidegate: API, relay, limits, ledger, admin and the wiring of it all."""
