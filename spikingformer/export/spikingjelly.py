"""Weights to and from SpikingJelly's Spikformer (spikingjelly.activation_based.model.spikformer, 2.0).

Its model downsamples as ours with CML (convolution, BatchNorm, pool, neuron), joins q, k and v in one product and has
no biases before BatchNorm. Our biases b are carried over as a running mean lowered by b, which computes the same.
SpikingJelly itself is not needed: state dicts are converted.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spikingformer.models import Spikformer, SpikingTransformer

_BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def to_spikingjelly(model: SpikingTransformer) -> dict[str, Tensor]:
    """The state dict of SpikingJelly's Spikformer that computes what `model` computes (in eval mode).

    Its output keeps the time axis, (T, B, classes): the mean over T is our logits.
    Raises ValueError for a model that SpikingJelly's class cannot hold.
    """
    _check(model)
    ours = model.state_dict()
    out: dict[str, Tensor] = {}
    for theirs, sources in _products(model).items():
        out |= _joined(ours, sources, *theirs)
    out["head.weight"], out["head.bias"] = ours["head.weight"].clone(), ours["head.bias"].clone()
    return out


def from_spikingjelly(state_dict: Mapping[str, Tensor], model: SpikingTransformer) -> dict[str, Tensor]:
    """A state dict of SpikingJelly's Spikformer as one that `model.load_state_dict(..., strict=True)` takes.

    Biases before a BatchNorm, which SpikingJelly does not have, become 0. Raises ValueError that names a key that is
    missing, left over or of another shape.
    """
    _check(model)
    target = model.state_dict()
    out: dict[str, Tensor] = {}
    used = {"head.weight", "head.bias"}
    for (conv, bn), sources in _products(model).items():
        keys = [f"{conv}.weight", *(f"{bn}.{k}" for k in _BN)]
        used |= set(keys)
        weight, *norm = (_take(state_dict, key) for key in keys)
        for i, source in enumerate(sources):
            out[f"{source}.conv.weight"] = weight.chunk(len(sources))[i]
            if f"{source}.conv.bias" in target:
                out[f"{source}.conv.bias"] = torch.zeros_like(target[f"{source}.conv.bias"])
            for name, value in zip(_BN, norm, strict=True):
                out[f"{source}.bn.{name}"] = value.chunk(len(sources))[i] if value.ndim else value
    out["head.weight"], out["head.bias"] = _take(state_dict, "head.weight"), _take(state_dict, "head.bias")
    if left := sorted(set(state_dict) - used):
        raise ValueError(
            f"{len(left)} keys do not belong to this {type(model).__name__}, first {left[0]}: check its depth"
        )
    for name, value in out.items():
        if value.numel() != target[name].numel():
            raise ValueError(
                f"{name}: SpikingJelly's weights have {tuple(value.shape)}, the model {tuple(target[name].shape)}: "
                "create it with the same embed_dim, mlp_ratio and number of classes"
            )
        out[name] = value.reshape(target[name].shape).clone()
    return out


def _check(model: SpikingTransformer) -> None:
    if not isinstance(model, Spikformer):
        raise ValueError(f"SpikingJelly has Spikformer only, got {type(model).__name__}")
    c = model.config
    wanted = {"pool": "cml", "tau": 2.0, "attention_scale": 0.125}
    for name, value in wanted.items():
        if getattr(c, name) != value:
            raise ValueError(
                f"SpikingJelly's Spikformer has {name} {value!r}, this model {getattr(c, name)!r}: "
                "the spikes would differ"
            )
    if tuple(c.pooled_stages) not in ((2, 3), (0, 1, 2, 3)):
        raise ValueError(f"SpikingJelly's Spikformer pools stages (2, 3) or all four, got {c.pooled_stages}")


def _products(model: SpikingTransformer) -> dict[tuple[str, str], list[str]]:
    """{(SpikingJelly's convolution, its BatchNorm): [our products that it joins]}."""
    stem = {f"patch_embed.stages.{i}.conv_bn.block": [f"stem.stages.{i}"] for i in range(4)}
    stem["patch_embed.positional_encoding.conv_bn.block"] = ["stem.rpe"]
    for i in range(len(model.blocks)):
        b = f"blocks.{i}"
        stem[f"{b}.attn.qkv_conv_bn"] = [f"{b}.attn.{n}" for n in "qkv"]
        stem[f"{b}.attn.proj_conv_bn"] = [f"{b}.attn.proj"]
        stem |= {f"{b}.mlp.fc{n}": [f"{b}.mlp.fc{n}"] for n in (1, 2)}
    return {(f"{theirs}.0", f"{theirs}.1"): ours for theirs, ours in stem.items()}


def _joined(ours: Mapping[str, Tensor], sources: list[str], conv: str, bn: str) -> dict[str, Tensor]:
    weight = torch.cat([ours[f"{s}.conv.weight"] for s in sources])
    one_dimensional = weight.shape[-1] == 1
    out = {f"{conv}.weight": weight.squeeze(-1) if one_dimensional else weight.clone()}
    for name in _BN:
        parts = [ours[f"{s}.bn.{name}"] for s in sources]
        out[f"{bn}.{name}"] = torch.cat(parts) if parts[0].ndim else parts[0].clone()
    biases = [ours.get(f"{s}.conv.bias") for s in sources]
    if biases[0] is not None:
        out[f"{bn}.running_mean"] = out[f"{bn}.running_mean"] - torch.cat([b for b in biases if b is not None])
    return out


def _take(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"{key} is missing: expected a state dict of SpikingJelly 2.0's Spikformer of the same depth")
    return state_dict[key]
