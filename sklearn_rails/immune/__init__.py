"""The five steps as pure functions on tensors: no estimator, no global state."""

from .memory import MemoryBank
from .response import ImmuneResponse

__all__ = ["ImmuneResponse", "MemoryBank"]
