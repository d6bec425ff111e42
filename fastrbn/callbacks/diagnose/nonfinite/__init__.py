"""`HaltOnNaN`: stop at the first NaN or Inf and say where it began."""

from .halt import HaltOnNaN
from .report import NonFiniteError, NonFiniteReport

__all__ = ["HaltOnNaN", "NonFiniteError", "NonFiniteReport"]
