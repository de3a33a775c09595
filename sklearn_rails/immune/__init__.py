"""One immune response, from flock to vote."""

from .engine import ImmuneEngine
from .gates import Arbitration, Triage
from .layer import ResponseLayer
from .memory import MemoryBank
from .response import ImmuneResponse

__all__ = [
    "Arbitration",
    "ImmuneEngine",
    "ImmuneResponse",
    "MemoryBank",
    "ResponseLayer",
    "Triage",
]
