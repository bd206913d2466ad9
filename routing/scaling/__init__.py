"""How many replicas a pool should have, and why. No clock, no I/O: who runs it tells it the time and what is seen."""

from routing.scaling.learned import Implausible, Learned
from routing.scaling.scaler import Scaler
from routing.scaling.types import Demand, Reason, Recommendation, Rules

__all__ = ["Demand", "Implausible", "Learned", "Reason", "Recommendation", "Rules", "Scaler"]
