"""The parameters of one leaky integrate-and-fire neuron."""

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from .surrogate import get_surrogate


@dataclass(frozen=True)
class LIFConfig:
    """Leaky integrate-and-fire neuron, as published with Spikingformer (SpikingJelly's MultiStepLIFNode).

    h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset)) / tau;  s_t = [h_t >= v_threshold];  v_t = reset(h_t, s_t)

    Raises ValueError where a value makes no neuron.
    """

    tau: float = 2.0  # membrane time constant, in time steps; > 1 leaks, 1 forgets at once
    v_threshold: float = 1.0  # fires at h >= v_threshold
    v_reset: float | None = 0.0  # potential after a spike; None: soft reset, v = h - v_threshold
    surrogate: str = "sigmoid"
    alpha: float | None = None  # width of the surrogate; None: its own default
    detach_reset: bool = True  # no gradient through the reset
    decay_input: bool = True  # the input is divided by tau too; False: h = v - (v - v_reset) / tau + x

    def __post_init__(self) -> None:
        surrogate = get_surrogate(self.surrogate)
        for name in ("tau", "v_threshold", "v_reset", "alpha"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad:
                value = value.item()
                object.__setattr__(self, name, value)
            if value is not None and not isinstance(value, Real):
                raise ValueError(
                    f"{name} must be a number, got {type(value).__name__}: it is fixed when the neuron is made, and is "
                    "not learnt"
                )
        if self.alpha is None:
            object.__setattr__(self, "alpha", surrogate.alpha)
        if not (math.isfinite(self.tau) and self.tau >= 1):
            raise ValueError(f"tau must be a finite number of time steps >= 1, got {self.tau}")
        if not math.isfinite(self.v_threshold):
            raise ValueError(f"v_threshold must be finite, got {self.v_threshold}")
        if self.v_reset is not None and not self.v_reset < self.v_threshold:
            raise ValueError(f"v_reset must lie below v_threshold {self.v_threshold}, got {self.v_reset}")
        if not (self.alpha is not None and self.alpha > 0):
            raise ValueError(f"alpha must be > 0, got {self.alpha}")

    @property
    def v_rest(self) -> float:
        """The potential that a membrane starts from and leaks to."""
        return 0.0 if self.v_reset is None else self.v_reset
