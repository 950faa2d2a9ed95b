"""The functions of this package; each has the meaning of the plain form named in its text."""

from .lif import lif

__all__ = ["lif"]
