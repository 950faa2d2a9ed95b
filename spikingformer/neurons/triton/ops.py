"""The functions of this package; each has the meaning of the plain form named in its text."""

from .lif import lif
from .stage import bn_pool_lif, bn_statistics

__all__ = ["bn_pool_lif", "bn_statistics", "lif"]
