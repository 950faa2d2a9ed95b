"""Spikes that are computed again in backward instead of being kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Recomputable:
    """Spikes and how to compute them again, bit for bit, from what is kept anyway.

    `again` must hold no tensor that takes part in autograd: detach them.
    """

    def __init__(self, spikes: Tensor, again: Callable[[], Tensor]) -> None:
        self.spikes, self._again = spikes, again
        self._memory = spikes.untyped_storage().data_ptr()

    def kept_as_recipe(self) -> AbstractContextManager[object]:
        """Inside, whatever autograd would keep of these spikes, views of them included, it computes again later."""
        if not torch.is_grad_enabled():
            return nullcontext()
        memory, again = self._memory, self._again

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() != memory:
                return tensor
            return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                return again().as_strided(*kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
