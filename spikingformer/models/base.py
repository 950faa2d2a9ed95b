"""What both families share: their configuration, the walk from picture to logits, and timm's manners.

T: time steps, B: batch, C: channels, H, W: rows and columns. Inside, tensors are (T, B, C, H, W).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spikingformer.layers import ORDERS, ConvBNLIF
from spikingformer.neurons import LIF, LIFConfig, State

from .gpu import features_on_gpu
from .whole import run_whole


@dataclass(frozen=True)
class ModelConfig:
    """One model, flat. Raises ValueError where the numbers do not fit together."""

    embed_dim: int = 384  # width C of the blocks; the stem's are an eighth, a quarter and a half of it, rounded down
    depth: int = 4  # blocks
    num_heads: int = 8  # attention heads; must divide embed_dim
    mlp_ratio: float = 4.0  # hidden width of the MLP over embed_dim
    pool: str = "cml"  # downsampling: "cml" pools currents, "sps" pools spikes
    pooled_stages: tuple[int, ...] = (0, 1, 2, 3)  # stem stages that halve the picture
    tau: float = 2.0  # membrane time constant of every neuron, in time steps
    attention_scale: float = 0.125  # factor on q k^T v, whatever the head's width
    attention_order: str = "kv"  # which product comes first, "qk" or "kv"
    qkv_bias: bool = False  # bias in q, k, v (before a BatchNorm it learns nothing)
    img_size: tuple[int, int] = (224, 224)  # rows, columns, in pixels
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head
    time_steps: int = 4  # T for still pictures; event frames bring their own
    drop_path_rate: float = 0.0  # stochastic depth of the last block; rises linearly from 0
    surrogate: str = "sigmoid"

    def __post_init__(self) -> None:
        for name in ("pooled_stages", "img_size"):  # lists come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        lowest = {"embed_dim": 8, "depth": 1, "in_chans": 1, "num_classes": 0, "time_steps": 1}
        for name, low in lowest.items():  # the stem starts at an eighth of embed_dim
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
            object.__setattr__(self, name, int(value))  # numpy's, for one
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        if not set(self.pooled_stages) <= {0, 1, 2, 3} or len(set(self.pooled_stages)) < len(self.pooled_stages):
            raise ValueError(f"pooled_stages must be different numbers of 0, 1, 2, 3, got {self.pooled_stages}")
        if not self.embed_dim * self.mlp_ratio >= 1:
            raise ValueError(
                f"mlp_ratio must give at least one hidden channel for embed_dim {self.embed_dim}, got {self.mlp_ratio}"
            )
        if self.pool not in ("cml", "sps"):
            raise ValueError(f'pool must be "cml" or "sps", got {self.pool!r}')
        if self.attention_order not in ORDERS:
            raise ValueError(f"attention_order must be one of {ORDERS}, got {self.attention_order!r}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}")
        self.check_size(*self.img_size)

    @property
    def takes_events(self) -> bool:
        """Whether this is a model of event frames (B, T, 2, H, W): counts of events, a channel for each polarity.

        Models with any other number of channels are made for pictures.
        """
        return self.in_chans == 2

    @property
    def patch_size(self) -> int:
        """Pixels a side that one token stands for."""
        return 2 ** len(self.pooled_stages)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError where the downsampling does not divide a picture of this size."""
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(
                f"the downsampling halves {len(self.pooled_stages)} times, so a picture's height and width must be "
                f"multiples of {p}; got {height}x{width}: resize or pad it, for example to "
                f"{max(p, round(height / p) * p)}x{max(p, round(width / p) * p)}"
            )

    def lif(self, v_threshold: float = 1.0) -> LIFConfig:
        """The neuron of this model at a threshold."""
        return LIFConfig(tau=self.tau, v_threshold=v_threshold, surrogate=self.surrogate)


@dataclass(frozen=True)
class StreamState:
    """A model in flight: the membranes of its neurons in call order, and what the head has seen so far."""

    membranes: tuple[Tensor, ...]  # one (B, C, H, W) a neuron layer
    feature_sum: Tensor  # (B, C): features summed over tokens' mean and time steps
    steps: int  # time steps seen


def _check_state(state: StreamState, batch: int, neurons: int) -> None:
    if not isinstance(state, StreamState):
        raise ValueError(f"expected the StreamState that stream() returned, or None, got {type(state).__name__}")
    if len(state.membranes) != neurons:
        raise ValueError(
            f"the state holds membranes of {len(state.membranes)} neuron layers, this model has {neurons}: it is "
            "another model's; start with None"
        )
    if len(state.feature_sum) != batch:
        raise ValueError(
            f"the state is of a batch of {len(state.feature_sum)}, the input of {batch}: give as many samples as "
            "before, or start with None"
        )


def _mean_over_tokens(x: Tensor) -> Tensor:
    """(T, B, C, H, W) to (T, B, C), in the order in which x lies in memory: its gradient lies alike, without a copy."""
    return x.permute(0, 1, 3, 4, 2).mean((2, 3)) if x.stride(2) == 1 else x.mean((3, 4))


class SpikingTransformer(nn.Module):
    """Base of the families: `stem` gives (T, B, C, H, W), `blocks` keep that shape, the head reads its mean.

    Called with pictures (B, C, H, W), repeated for `time_steps`, or event frames (B, T, C, H, W); returns logits
    (B, num_classes). Calls are stateless: nothing carries over from one to the next.

    Input is not searched for NaN or infinity, which would take time at every call. Such a pixel only changes which
    neurons fire, so the logits can stay finite: check data of your own with `x.isfinite().all()`.

    In train mode with B = 1 the last BatchNorm normalises over the very values that the head averages, so its
    gradients vanish: train with at least two samples.
    """

    stem: nn.Module
    blocks: nn.ModuleList
    grad_checkpointing = False  # see `set_grad_checkpointing`

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = config.embed_dim
        self.time_steps = config.time_steps
        self.in_chans = config.in_chans  # timm reads it

    def set_time_steps(self, time_steps: int) -> None:
        """T that still pictures are shown for from now on; event frames bring their own. Weights do not depend on it.

        Raises ValueError for anything but a whole number of at least 1.
        """
        self.config = replace(self.config, time_steps=time_steps)
        self.time_steps = self.config.time_steps

    def _finish(self) -> None:
        """Called by a family once stem and blocks stand."""
        c = self.config
        reduction = c.patch_size
        self.feature_info = [
            {"num_chs": c.embed_dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(c.depth)
        ]
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(c.num_classes)

    def frames(self, x: Tensor) -> tuple[Tensor, int]:
        """Input to (frames (t, B, C, H, W), repeats): a still picture is one frame that stands for T."""
        c = self.config
        if not isinstance(x, Tensor):
            raise ValueError(
                f"expected pictures (B, C, H, W) or event frames (B, T, C, H, W) as a torch tensor, got "
                f"{type(x).__name__}: convert it, for example with torch.from_numpy(x).float()"
            )
        if x.ndim not in (4, 5):
            raise ValueError(
                f"expected pictures (B, C, H, W) or event frames (B, T, C, H, W), got shape {tuple(x.shape)}"
            )
        if x.shape[-3] != c.in_chans:
            raise ValueError(f"the model takes {c.in_chans} channels, got {x.shape[-3]}: create it with in_chans=...")
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point numbers, got {x.dtype}: give x.float()")
        c.check_size(x.shape[-2], x.shape[-1])
        if x.ndim == 4:
            return x.unsqueeze(0), self.time_steps
        if x.shape[1] < 1:
            raise ValueError("event frames need at least one time step, got none")
        return x.transpose(0, 1), 1

    def forward_features(self, x: Tensor, state: State | None = None) -> Tensor:
        """Pictures or event frames to the last block's output (T, B, C, H, W)."""
        frames, repeats = self.frames(x)
        return self._features(frames, repeats, state)

    def _features(self, frames: Tensor, repeats: int, state: State | None) -> Tensor:
        if state is None and (features := features_on_gpu(self, frames, repeats)) is not None:
            return features
        x = self.stem(frames, state, repeats)
        for block in self.blocks:
            x = block(x, state)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(T, B, C, H, W) to logits (B, num_classes), or to their input (B, C) with `pre_logits`."""
        x = _mean_over_tokens(x).mean(0)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) or event frames (B, T, C, H, W) to logits (B, num_classes)."""
        if (steps := run_whole(self, x)) is not None:
            return steps[-1]
        return self.forward_head(self.forward_features(x))

    def forward_steps(self, x: Tensor) -> Tensor:
        """Logits after each time step, (T, B, num_classes); the last ones are those of a plain call."""
        if (whole := run_whole(self, x)) is not None:
            return whole
        features = _mean_over_tokens(self.forward_features(x))
        steps = torch.arange(1, len(features) + 1, device=x.device, dtype=features.dtype)
        return self.head(features.cumsum(0) / steps[:, None, None])

    def stream(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """One or more time steps of a longer input: (logits so far (B, num_classes), the state to go on from).

        x: one time step (B, C, H, W), or several (B, T, C, H, W). Feeding all steps gives the logits of one call.
        Raises ValueError for a state of another model or of another batch size.
        """
        frames, _ = self.frames(x)
        neurons = self.neurons()
        if state is not None and not torch.compiler.is_compiling():
            _check_state(state, len(x), len(neurons))
        membranes: State = {} if state is None else dict(zip(neurons, state.membranes, strict=True))
        features = _mean_over_tokens(self._features(frames, 1, membranes)).sum(0)
        steps = len(frames)
        if state is not None:
            features, steps = features + state.feature_sum, steps + state.steps
        new_state = StreamState(tuple(membranes[n] for n in neurons), features, steps)
        return self.head(features / steps), new_state

    def family(self) -> str:
        """Name of the family: "spikingformer" or "spikformer"."""
        raise NotImplementedError

    def neurons(self) -> list[LIF]:
        """The neuron layers, in call order."""
        return [m for m in self.modules() if isinstance(m, LIF)]

    def get_classifier(self) -> nn.Module:
        """The head (timm's name)."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes`, or none for 0. Tokens and time are always averaged."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"only average pooling is there (global_pool='avg'), got {global_pool!r}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _block_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        n = len(self.blocks)
        if indices is None:
            return list(range(n))
        chosen: Sequence[int] = ()
        if not isinstance(indices, int):
            chosen = indices
        elif 1 <= indices <= n:
            chosen = range(n - indices, n)
        if len(chosen) == 0 or not all(-n <= i < n for i in chosen):
            raise ValueError(
                f"the model has {n} blocks: give a number of last ones from 1 to {n}, or a sequence of indices from "
                f"-{n} to {n - 1}; got {indices}"
            )
        return [i % n for i in chosen]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's feature extraction: the outputs of chosen blocks, (B, C, H, W) each, averaged over time.

        `indices`: which blocks (an int: that many last ones; None: all), given in the model's order. There is no final
        norm to apply. Raises ValueError for a block that the model does not have, and for none at all.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"only output_fmt='NCHW' is there, got {output_fmt!r}")
        wanted = self._block_indices(indices)
        frames, repeats = self.frames(x)
        y = self.stem(frames, None, repeats)
        out = []
        for i, block in enumerate(self.blocks):
            y = block(y, None)
            if i in wanted:
                out.append(y.mean(0))
            if stop_early and i >= max(wanted):
                break
        return out if intermediates_only else (y, out)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks behind the last one wanted, and the head (timm's feature wrapper calls this).

        Raises ValueError as `forward_intermediates` does.
        """
        wanted = self._block_indices(indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def no_weight_decay(self) -> set[str]:
        """Names that take no weight decay beyond biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Parameter groups for timm's layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Training on a GPU keeps no spikes: backward computes them again from the products' outputs.

        Numbers stay the same. No product runs twice, so BatchNorm's buffers move once a step. On a CPU, and where the
        fused kernels do not serve, nothing changes.
        """
        self.grad_checkpointing = enable


def stem_stages(config: ModelConfig) -> nn.ModuleList:
    """Four 3x3 convolutions with neurons, from an eighth of the width to all of it.

    Those in `pooled_stages` halve the picture.
    """
    c, d = config, config.embed_dim
    widths = (c.in_chans, d // 8, d // 4, d // 2, d)
    return nn.ModuleList(
        ConvBNLIF(a, b, 3, pool=c.pool if i in c.pooled_stages else None, lif=c.lif())
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    )


def block_drop_path(config: ModelConfig) -> list[float]:
    """The drop-path rate of each block, rising linearly to `drop_path_rate`."""
    return [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]
