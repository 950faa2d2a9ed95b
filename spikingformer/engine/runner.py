"""Inference of a model on the compiled kernels, all spikes as bits: in float32, or with int8 weights."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from spikingformer.native import status
from spikingformer.native.library import current_isa

from .fixed_point import quantize_neuron, quantize_scale
from .int8_reference import HIGHEST
from .kernel_calls import KernelCalls
from .program import Attention, Fire, Program, build_program

FORMS = ("float32", "int8")
CACHE_BYTES = 26 << 20  # slices of the batch are cut so that their widest currents stay about this small


def _saturates_unseen(step: Attention) -> bool:
    """Whether counts q (k^T v) may stop at HIGHEST: any that large fires the neuron, and a hard reset forgets it."""
    n = step.lif
    largest = HIGHEST * step.scale / (n.tau if n.decay_input else 1)
    return n.v_reset is not None and largest > 2 * (n.v_threshold - n.v_reset)  # twice: rounding decides nothing


class Engine:
    """A model made ready for inference on this processor; a later change of the model does not reach it.

    `form`: "float32" (the model's own numbers up to rounding; sums are exact, whatever the batch) or "int8"
    (int8 weights, fixed-point neurons; equal to `int8_reference.run` bit for bit). Called like the model: pictures
    (B, C, H, W) or event frames (B, T, C, H, W) to logits (B, num_classes), float32. No gradients.

    Threads may share an engine: its buffers serve one call at a time, so calls take turns. A copy (`copy.deepcopy`,
    pickle) has buffers of its own and runs beside the original.

    Raises ValueError for a model not of this package, a Spikformer of more than 126 blocks (counts are bytes), neurons
    or an attention scale that the int8 form does not have, and where the C++ kernels are missing.
    """

    def __init__(self, model: nn.Module | Program, form: str = "float32"):
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if not (found := status()).available:
            raise ValueError(f"the engine needs the compiled kernels: {found.reason}")
        self.form = form
        self.integer = form == "int8"
        self._isa = current_isa()
        self._calls = KernelCalls(model if isinstance(model, Program) else build_program(model), self.integer)
        if self.integer:
            for step in self.program.steps:  # refuse at once, not in the middle of a run
                if isinstance(step, Fire | Attention):
                    quantize_neuron(step.lif)
                if isinstance(step, Attention):
                    quantize_scale(step.scale)
        # The widest head in which no count may saturate, 0 where all may: the int8 form is defined to saturate.
        exact = (
            s for s in self.program.steps if isinstance(s, Attention) and not self.integer and not _saturates_unseen(s)
        )
        self._exact_head_width = max((self.program.config.embed_dim // s.heads for s in exact), default=0)
        self._lock = threading.Lock()  # held by the call that uses the buffers: the kernels run without Python's lock

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its own lock."""
        state = dict(self.__dict__)
        del state["_lock"]  # cannot be copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def program(self) -> Program:
        """The steps that are run; without their weights after `drop_weights`."""
        return self._calls.program

    def drop_weights(self) -> None:
        """Forgets the program's weights in double precision: the packed ones are all that a run needs."""
        self._calls.drop_weights()

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward_steps(x)[-1]

    def forward_steps(self, x: Tensor) -> Tensor:
        """Logits after each time step, (T, B, num_classes), float32. Waits while another thread's call is running."""
        with self._lock:
            return self._forward_steps(x)

    def forward_steps_if_free(self, x: Tensor) -> Tensor | None:
        """`forward_steps`; None at once while another thread's call is running, and for more tokens than it takes."""
        if self._has_too_many_tokens(x) or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._forward_steps(x)
        finally:
            self._lock.release()

    def _tokens(self, x: Tensor) -> int:
        return x.shape[-2] * x.shape[-1] // self.program.config.patch_size**2

    def _has_too_many_tokens(self, x: Tensor) -> bool:
        return self._tokens(x) * self._exact_head_width > HIGHEST

    def _forward_steps(self, x: Tensor) -> Tensor:
        c = self.program.config
        if not isinstance(x, Tensor):
            raise ValueError(
                f"expected a torch tensor, got {type(x).__name__}: convert it, for example with "
                "torch.from_numpy(x).float()"
            )
        if x.ndim not in (4, 5) or x.shape[-3] != c.in_chans:
            raise ValueError(
                f"expected pictures (B, {c.in_chans}, H, W) or event frames (B, T, {c.in_chans}, H, W), got "
                f"{tuple(x.shape)}"
            )
        c.check_size(x.shape[-2], x.shape[-1])
        if self._has_too_many_tokens(x):
            raise ValueError(
                f"with this attention scale and neuron, the float32 engine takes spike counts up to {HIGHEST} in "
                f"attention, got an input of {self._tokens(x)} tokens and heads of width {self._exact_head_width}: "
                "give smaller pictures, or call the model itself"
            )
        if x.device.type != "cpu":
            raise ValueError(f"the engine runs on the CPU, got an input on {x.device}: give x.cpu()")
        if current_isa() != self._isa:
            raise RuntimeError(f"this engine was packed for {self._isa}, in use is {current_isa()}: make a new one")
        steps = c.time_steps if x.ndim == 4 else x.shape[1]
        if steps < 1:
            raise ValueError("event frames need at least one time step, got none")
        if not len(x):
            return torch.empty(steps, 0, self._calls.classes, dtype=torch.float32, device="cpu")
        largest = self._slice(x, steps)
        if len(x) <= largest:
            return self._calls.run(x, steps)
        return torch.cat([self._calls.run(part, steps) for part in x.split(largest)], 1)

    def _slice(self, x: Tensor, steps: int) -> int:
        """Samples at a time, in equal slices whose layers stay in the last cache between their steps."""
        widest = steps * x.shape[-2] * x.shape[-1] * self.program.config.embed_dim // 4 * (2 if self.integer else 4)
        slices = -(-len(x) * widest // CACHE_BYTES)
        return -(-len(x) // max(slices, 1))
