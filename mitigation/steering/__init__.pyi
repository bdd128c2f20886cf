"""Public modules of this wing."""

from . import derive, export

__all__ = ["derive", "export"]
