"""The functions of this package; each has the meaning of the plain form named in its text."""

from .attention import spike_attention, spike_attention_packed
from .lif import lif
from .stage import bn_pool_lif, bn_statistics

__all__ = ["bn_pool_lif", "bn_statistics", "lif", "spike_attention", "spike_attention_packed"]
