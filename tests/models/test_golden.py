"""Conformance with the published code, in float64: logits, loss, every gradient, BatchNorm buffers, every spike.

The vectors are not part of the project; the tests are skipped where they are absent.
"""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import spikingformer  # noqa: F401
from spikingformer.neurons import LIF
from spikingformer.official import convert_state_dict, our_name
from tests.conftest import SHARED

CASES = sorted(p.parent for p in (SHARED / "golden").glob("*/expected.json")) or [None]
RTOL = 1e-9  # float64 keeps 1e-16; sums of 1e5 terms in another order cost a few digits


def build(expected: dict) -> torch.nn.Module:
    kwargs = expected["kwargs"]
    pool = "cml_" if expected["family"].startswith("cml") else ""
    family = "spikformer" if "spikformer" in expected["family"] else "spikingformer"
    size = {"imagenet": "8_384", "cifar": "4_384"}.get(expected["family"].split("-")[-1].rstrip("01"), "2_256")
    return timm.create_model(
        f"{family}_{pool}{size}",
        img_size=(kwargs["img_size_h"], kwargs["img_size_w"]),
        in_chans=kwargs["in_channels"],
        num_classes=kwargs["num_classes"],
        embed_dim=kwargs["embed_dims"],
        depth=kwargs["depths"],
        num_heads=kwargs["num_heads"],
        mlp_ratio=kwargs["mlp_ratios"],
        time_steps=expected["T"],
    ).double()


@pytest.fixture(params=CASES, ids=lambda p: p.name if p else "absent")
def case(request) -> tuple[dict, dict, torch.nn.Module]:
    if request.param is None:
        pytest.skip("no conformance vectors here")
    folder = request.param
    expected = json.loads((folder / "expected.json").read_text())
    model = build(expected)
    state = {k: v.double() for k, v in load_file(folder / "state_dict.safetensors").items()}
    model.load_state_dict(convert_state_dict(state, model), strict=True)
    return expected, load_file(folder / "io.safetensors"), model


def record_spikes(model: torch.nn.Module) -> dict[LIF, torch.Tensor]:
    seen: dict[LIF, torch.Tensor] = {}
    for neuron in model.neurons():
        neuron.register_forward_hook(lambda m, _, out: seen.__setitem__(m, out.detach()))
    return seen


# a hook on a neuron makes its layer call its modules one by one: without hooks the fused forms run
watch = pytest.mark.parametrize("watched", [True, False], ids=["modules", "fused"])


def counts(model, seen, family, expected) -> dict[str, list[int]]:
    modules = dict(model.named_modules())
    names = {name: modules[our_name(name, family)] for name in expected["lif_order"]}
    return {name: seen[m].flatten(1).sum(1).long().tolist() for name, m in names.items()}


def summary(x: torch.Tensor) -> list[float]:
    flat = x.detach().double().flatten()
    i = torch.arange(flat.numel(), dtype=torch.float64)
    return [flat.norm().item(), flat.sum().item(), flat.dot(torch.cos(0.1 * i)).item()]


@watch
def test_eval(case, watched):
    expected, io, model = case
    family = model.family()
    model.eval()
    seen = record_spikes(model) if watched else {}
    with torch.no_grad():
        logits = model(io["input"].double())
        again = model(io["input"].double())
    torch.testing.assert_close(logits, io["eval_logits"], rtol=RTOL, atol=1e-12)
    assert torch.equal(again, logits), "a call leaves no state behind"
    if not watched:
        return
    assert counts(model, seen, family, expected) == expected["eval"]["spike_count_per_t"]

    modules = dict(model.named_modules())
    packed = b"".join(
        np.packbits(official_layout(seen[modules[our_name(n, family)]], shape, model).numpy().astype(bool)).tobytes()
        for n, shape in expected["lif_spike_shapes"].items()
    )
    assert packed == io["eval_spikes_packed"].numpy().tobytes(), "every spike sits where the published code has it"


def official_layout(s: torch.Tensor, shape: list[int], model: torch.nn.Module) -> torch.Tensor:
    if len(shape) == 5:
        return s
    # Spikformer's CIFAR code, the one with biases in q, k, v, keeps tokens before channels
    return s.flatten(3).transpose(2, 3) if model.config.qkv_bias else s.flatten(3)


@watch
def test_train_step(case, watched):
    expected, io, model = case
    family = model.family()
    model.train()
    seen = record_spikes(model) if watched else {}
    x = io["input"].double().requires_grad_()
    logits = model(x)
    loss = F.cross_entropy(logits, io["target"])
    loss.backward()
    torch.testing.assert_close(logits, io["train_logits"], rtol=RTOL, atol=1e-12)
    assert loss.item() == pytest.approx(expected["train"]["loss"], rel=RTOL)
    if watched:
        assert counts(model, seen, family, expected) == expected["train"]["spike_count_per_t"]

    parameters = dict(model.named_parameters())
    unchecked = set(parameters)
    for official, want in expected["train"]["grad_norm_sum_dot"].items():
        name = our_name(official, family)
        if want is None:
            assert name is None, f"{official} has no gradient in the published code"
            continue
        unchecked.discard(name)
        # a bias before a BatchNorm has gradient 0; both codes leave rounding noise there
        atol = 1e-9 * (1 + abs(want[0]))
        np.testing.assert_allclose(summary(parameters[name].grad), want, rtol=1e-8, atol=atol, err_msg=official)
    assert not unchecked, f"no expected gradient for {sorted(unchecked)}"
    np.testing.assert_allclose(summary(x.grad), expected["train"]["input_grad_norm_sum_dot"], rtol=1e-8, atol=1e-10)

    buffers = dict(model.named_buffers())
    after = {k.removeprefix("after_train_step."): v for k, v in io.items() if k.startswith("after_train_step.")}
    assert after
    for official, want in after.items():
        torch.testing.assert_close(buffers[our_name(official, family)], want, rtol=RTOL, atol=1e-12, msg=official)
