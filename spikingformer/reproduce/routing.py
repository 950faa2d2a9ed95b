"""Where a downsampling stage sends its gradient: to the largest current of a pooling window, or elsewhere.

"sps" fires and then pools: of a window's spikes, all 0 or 1, the first in reading order has the gradient.
"cml" pools and then fires: the largest current has it, exactly (arXiv 2305.05954).
Both are compared at the same weights, on the same currents, under the same gradient from above.

T: time steps, B: batch, C: channels, H, W: rows and columns. Tensors are (T, B, C, H, W).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingformer.layers import ConvBNLIF, batch_norm, max_pool
from spikingformer.neurons import LIF, LIFConfig


@dataclass(frozen=True)
class WindowRouting:
    """Counts over pooling windows; one window an output position, channel, picture and time step.

    A window is silent, has one spike, or has several (the fire-then-pool order then picks by position).
    "elsewhere": the gradient of fire-then-pool goes to a current that is smaller than the window's largest.
    """

    windows: int
    silent: int
    single: int
    several: int
    elsewhere: int
    elsewhere_silent: int
    elsewhere_single: int
    elsewhere_several: int

    @property
    def elsewhere_share(self) -> float:
        return self.elsewhere / self.windows

    @property
    def firing_elsewhere_share(self) -> float:
        """The same among windows that fire; nan where none does."""
        firing = self.single + self.several
        return (self.elsewhere - self.elsewhere_silent) / firing if firing else float("nan")


@dataclass(frozen=True)
class StageRouting:
    """One downsampling stage. Cosines compare gradients of the two orders; nan where one of them is zero."""

    stage: str
    windows: WindowRouting
    firing_rate: float  # of fire-then-pool's neurons, before the pool
    current_cosine: float  # gradients with respect to the currents, same gradient from above
    weight_cosine: float  # gradients of the stage's convolution, whole network in either order, same loss


def _pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pool of `spikingformer.layers.max_pool`, with the index (in H * W) that its gradient goes to."""
    y, index = F.max_pool2d(x.flatten(0, 1), kernel_size=3, stride=2, padding=1, return_indices=True)
    return y, index


def window_routing(currents: Tensor, spikes: Tensor) -> WindowRouting:
    """Compares the two orders' choice in every window of currents and their spikes, both (T, B, C, H, W).

    Equal largest currents are all "the largest": a gradient that reaches any of them is not elsewhere.
    """
    if currents.shape != spikes.shape or currents.ndim != 5:
        raise ValueError(
            f"expected currents and spikes of one shape (T, B, C, H, W), got {tuple(currents.shape)} and "
            f"{tuple(spikes.shape)}"
        )
    flat = currents.detach().flatten(0, 1)
    largest, _ = _pooled(currents.detach())
    fired, chosen = _pooled(spikes.detach())
    taken = flat.flatten(2).gather(2, chosen.flatten(2)).view_as(largest)
    elsewhere = taken < largest
    # number of spikes in each window: the sum over it, zeros outside the picture
    c = flat.shape[1]
    ones = torch.ones(c, 1, 3, 3, dtype=torch.float32, device=flat.device)
    count = F.conv2d(spikes.detach().flatten(0, 1).float(), ones, stride=2, padding=1, groups=c).round()
    kinds = {"silent": count == 0, "single": count == 1, "several": count > 1}
    assert torch.equal(fired == 0, kinds["silent"])
    return WindowRouting(
        windows=elsewhere.numel(),
        elsewhere=int(elsewhere.sum()),
        **{name: int(mask.sum()) for name, mask in kinds.items()},
        **{f"elsewhere_{name}": int((mask & elsewhere).sum()) for name, mask in kinds.items()},
    )


def order_gradients(currents: Tensor, lif: LIFConfig, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum(upstream * spikes out) with respect to currents (T, B, C, H, W): fire-then-pool, pool-then-fire.

    `upstream`: (T, B, C, ceil(H/2), ceil(W/2)).
    """
    neuron = LIF(lif)

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        y = currents.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(y), y, upstream)
        return grad

    return gradient(lambda y: max_pool(neuron(y))), gradient(lambda y: neuron(max_pool(y)))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors, in float64; nan where one is zero."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else float("nan")


def pooling_stages(model: nn.Module) -> dict[str, ConvBNLIF]:
    """The stages that downsample, by name, in call order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ConvBNLIF) and m.pool is not None}


def _currents(stage: ConvBNLIF, x: Tensor, repeats: int) -> Tensor:
    """What the stage's pool or neuron is given, (T, B, C, H, W)."""
    with torch.no_grad():
        y = stage.conv(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        y = batch_norm(stage.bn, y, repeats).unflatten(0, x.shape[:2])
    return y.expand(repeats, *y.shape[1:]).contiguous() if repeats > 1 else y


def _weight_gradients(model: nn.Module, pool: str, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Gradients of the downsampling stages' convolutions with every such stage in the order `pool`."""
    twin = copy.deepcopy(model)
    stages = pooling_stages(twin)
    for stage in stages.values():
        stage.pool = pool
    grads = torch.autograd.grad(loss(twin), [s.conv.weight for s in stages.values()])
    return dict(zip(stages, grads, strict=True))


def measure_routing(model: nn.Module, x: Tensor, labels: Tensor, smoothing: float = 0.0) -> list[StageRouting]:
    """Measures every downsampling stage of a model on one batch, under its cross-entropy, in train mode.

    x: pictures (B, C, H, W) or event frames (B, T, C, H, W); labels (B,). The model is left as it was.

    Raises ValueError for a model without a downsampling stage, or a batch of one (its gradients vanish).
    """
    if len(x) < 2:
        raise ValueError("one sample: in train mode its gradients vanish; give at least two")
    if not pooling_stages(model):
        raise ValueError(f"{type(model).__name__} has no downsampling stage (ConvBNLIF with a pool)")

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), labels, label_smoothing=smoothing)

    seen: dict[str, tuple[Tensor, int]] = {}
    upstream: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, args: tuple, out: Tensor) -> None:
            seen[name] = (args[0].detach(), args[2] if len(args) > 2 else 1)
            out.register_hook(lambda g: upstream.__setitem__(name, g.detach()))

        return hook

    copied = copy.deepcopy(model).train()
    stages = pooling_stages(copied)
    handles = [s.register_forward_hook(watch(n)) for n, s in stages.items()]
    loss(copied).backward()
    for h in handles:
        h.remove()
    fresh = copy.deepcopy(model).train()
    weights = {pool: _weight_gradients(fresh, pool, loss) for pool in ("sps", "cml")}
    result = []
    for name, stage in pooling_stages(fresh).items():
        currents = _currents(stage, *seen[name])
        with torch.no_grad():
            spikes = LIF(stage.lif.config)(currents)
        fire_pool, pool_fire = order_gradients(currents, stage.lif.config, upstream[name])
        result.append(
            StageRouting(
                stage=name,
                windows=window_routing(currents, spikes),
                firing_rate=float(spikes.mean()),
                current_cosine=cosine(fire_pool, pool_fire),
                weight_cosine=cosine(weights["sps"][name], weights["cml"][name]),
            )
        )
    return result
