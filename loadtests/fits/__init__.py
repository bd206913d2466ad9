"""Constants of engines, fitted to recorded runs of real ones. Not installed."""
