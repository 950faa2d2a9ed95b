"""Counts without data: from shapes alone, or from shapes with given or assumed firing rates."""

import copy
import difflib
from typing import Any

import timm
import torch

import spikingformer.models

from .counting import count_operations
from .facts import Facts, Kind, Operand
from .rates import Rates


def static_counts(model: torch.nn.Module | str, input_shape: tuple[int, ...] | None = None, **overrides: Any) -> Facts:
    """Counts from shapes alone: dense and valid products, neuron updates; no events.

    `model`: a registered name (`overrides` go to timm.create_model), or a module, which is copied to the meta device.
    `input_shape`: of one sample, (C, H, W) or (T, C, H, W); default: what the model was made for. Models with two
    input channels take event frames.
    """
    if isinstance(model, str):
        if not timm.is_model(model):
            near = difflib.get_close_matches(model, spikingformer.models.VARIANTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"unknown model {model!r}{hint} `spikingformer models` lists ours")
        _, _, tag = model.partition(".")
        if tag and not timm.is_model_pretrained(model):
            raise ValueError(
                f"{model}: there are no weights {tag!r} of this model; `spikingformer models` lists those that come "
                "with the package"
            )
        with torch.device("meta"):
            module = timm.create_model(model, **overrides)
        name = model
    else:
        module, name = copy.deepcopy(model).to("meta"), type(model).__name__
    if input_shape is None:
        if not isinstance(module, spikingformer.models.SpikingTransformer):
            raise ValueError(
                f"{name} is not a model of this package (`spikingformer models` lists them) and does not say its "
                "input shape: in Python, give static_counts(model, input_shape=(C, H, W))"
            )
        c = module.config
        picture = (c.in_chans, *c.img_size)
        input_shape = (c.time_steps, *picture) if c.takes_events else picture
    facts = count_operations(module, [torch.empty(1, *input_shape, device="meta")], name=name)
    facts.source = "shapes only"
    return facts


def with_rates(static: Facts, rates: Rates) -> Facts:
    """Expected counts of a model under given firing rates: events = share of nonzero inputs x valid products.

    Two spikes are assumed to coincide independently (r_q r_k), and a sum of K such products to be nonzero with
    1 - (1 - r_a r_b)^K. Analog inputs have rate 1 unless listed. Raises ValueError for a layer without a rate.
    """
    facts = copy.deepcopy(static)
    facts.source = rates.source
    missing = []
    for p in facts.products:
        if not p.weighted:
            continue
        rate = rates.inputs.get(p.name, 1.0 if p.kind == Kind.ANALOG else rates.default)
        if rate is None:
            missing.append(p.name)
            continue
        nonzero = rates.nonzero.get(p.name, min(rate, 1.0))
        _fill(p.input, nonzero, rate)
        p.events = p.events_nonzero_weights = nonzero * p.valid
    for a in facts.attentions:
        listed = rates.attention.get(a.name)
        qkv = listed if listed is not None else None if rates.default is None else (rates.default,) * 3
        if qkv is None:
            missing.append(f"{a.name} (q, k, v)")
            continue
        for operand, rate in zip((a.q, a.k, a.v), qkv, strict=True):
            _fill(operand, rate, rate)
        _fill_attention(facts, a.name, qkv)
    if missing:
        raise ValueError(
            f"no rate for {len(missing)} of the model's layers, first {', '.join(missing[:3])}: list them, "
            "or assume one rate for all"
        )
    unknown = [n for n in rates.inputs if n not in {p.name for p in facts.products}]
    if unknown and rates.default is None:
        raise ValueError(f"rates name layers that the model does not have: {', '.join(unknown[:3])}")
    return facts


def _fill(operand: Operand, nonzero: float, mean: float) -> None:
    operand.nonzero = nonzero * operand.elements
    operand.total = mean * operand.elements


def _fill_attention(facts: Facts, name: str, qkv: tuple[float, ...]) -> None:
    q, k, v = qkv
    first, second = (p for p in facts.products if p.name.startswith(f"{name}:"))
    a, b, c = (q, k, v) if first.role == "qk" else (k, v, q)
    inner = first.in_shape[1]
    density = 1 - (1 - a * b) ** inner
    assert first.other is not None
    assert second.other is not None
    _fill(first.input, a, a)
    _fill(first.other, b, b)
    first.events = first.events_nonzero_weights = a * b * first.dense
    left, right = (density, c) if first.role == "qk" else (c, density)
    _fill(second.input, left, left)
    _fill(second.other, right, right)
    second.events = second.events_nonzero_weights = left * right * second.dense
