"""An event model run step by step with explicit state gives the logits of one call, on simulated and real frames.

In float64: in float32 the fused stage rounds otherwise than the stepwise one, which can flip a spike at the threshold.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import spikingformer  # noqa: F401  (registers the models)
from spikingformer.data.events.recording import load_recording_as_frames

MODELS = ["spikingformer_2_256", "spikingformer_cml_2_256", "spikformer_2_256", "spikformer_cml_2_256"]


def model_on(name: str, frames: torch.Tensor) -> torch.nn.Module:
    """A narrow model whose BatchNorms have seen the frames, so that its neurons fire."""
    torch.manual_seed(0)
    size = frames.shape[-1]
    model = timm.create_model(name, img_size=size, in_chans=2, num_classes=11, embed_dim=32, num_heads=4).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.7
            torch.nn.init.constant_(module.weight, 2.0)  # enough current for every layer to fire
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.cat([frames, frames.flip(-1)]))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_streaming_equals_one_call(name: str) -> None:
    frames = torch.randint(0, 4, (2, 6, 2, 32, 32), generator=torch.Generator().manual_seed(1)).double()
    model = model_on(name, frames)
    whole, after_step = model(frames), model.forward_steps(frames)
    state = None
    for step in range(frames.shape[1]):
        logits, state = model.stream(frames[:, step], state)
        # the head's mean over time is summed in another order
        torch.testing.assert_close(logits, after_step[step], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    chunks = model.stream(frames[:, 4:], model.stream(frames[:, :4])[1])[0]
    torch.testing.assert_close(chunks, whole, atol=1e-5, rtol=1e-5)
    # the check can fail: a state that is forgotten gives other logits
    forgotten, _ = model.stream(frames[:, -1])
    assert (forgotten - whole).abs().max() > 1e-3


@torch.no_grad()
def test_streaming_a_real_recording(real_events_dir: Path) -> None:
    path = real_events_dir / "dvsgesture" / "slayer_bs2" / "9.bs2"
    frames = load_recording_as_frames(path, 5, frame_size=(64, 64))[0].double()
    model = model_on("spikingformer_cml_2_256", frames)
    state = None
    for step in range(5):
        logits, state = model.stream(frames[:, step], state)
    torch.testing.assert_close(logits, model(frames), atol=1e-5, rtol=1e-5)
    assert state.steps == 5
