"""`Distributed`: one fit in many processes."""

from .callback import Distributed

__all__ = ["Distributed"]
