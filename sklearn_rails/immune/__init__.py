"""The five steps as pure functions on tensors: no estimator, no global state."""

from .response import ImmuneResponse

__all__ = ["ImmuneResponse"]
