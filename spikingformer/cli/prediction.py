"""The most likely classes of files and of test samples."""

import struct
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn

from spikingformer.data.events.nmnist_bin import NMNIST_SUFFIXES
from spikingformer.data.folder import UnreadablePicture, decode_picture
from spikingformer.data.per_sample import evaluation_transform
from spikingformer.models import SpikingTransformer
from spikingformer.training.checkpoint import ModelInfo


def _ranked(logits: torch.Tensor, info: ModelInfo, top: int) -> list[dict[str, Any]]:
    probabilities = logits.float().softmax(0)
    best = probabilities.topk(min(top, len(probabilities)))
    return [
        {"name": info.class_names[int(i)], "index": int(i), "probability": float(p)}
        for p, i in zip(best.values, best.indices, strict=True)
    ]


@torch.inference_mode()
def predict_files(model: nn.Module, info: ModelInfo, files: list[str], top: int, batch_size: int) -> Iterator[dict]:
    """One row per file: {"file", "classes": [{"name", "index", "probability"}]} or {"file", "error"}."""
    if info.kind == "events":
        for file in files:
            yield _predict_recording(model, info, file, top)
        return
    device = next(model.parameters()).device
    transform = evaluation_transform(
        info.image_size, info.channels, info.interpolation, info.crop_fraction, info.mean, info.std
    )
    for start in range(0, len(files), batch_size):
        chosen = files[start : start + batch_size]
        decoded = []
        for file in chosen:
            with open(file, "rb") as stream:
                decoded.append(decode_picture(stream, info.channels, file))
        readable = [transform(_upright(picture)) for picture in decoded if not isinstance(picture, UnreadablePicture)]
        logits = iter(model(torch.stack(readable).to(device)) if readable else [])
        for file, picture in zip(chosen, decoded, strict=True):
            if isinstance(picture, UnreadablePicture):
                yield {"file": file, "error": picture.reason}
            else:
                yield {"file": file, "classes": _ranked(next(logits), info, top)}


def _upright(picture: Image.Image) -> Image.Image:
    """The picture rotated as its EXIF data says. Data sets are not rotated, as in the published code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF data does not make the picture unusable
        try:
            return ImageOps.exif_transpose(picture)
        except (SyntaxError, ValueError, OSError, KeyError, struct.error):
            return picture


def _predict_recording(model: nn.Module, info: ModelInfo, file: str, top: int) -> dict[str, Any]:
    from spikingformer.data.events import EventFileError
    from spikingformer.data.events.recording import load_recording_as_frames

    framing = info.event_framing
    try:
        frames, seconds = load_recording_as_frames(file, info.kwargs["time_steps"], framing.split_by, info.image_size)
    except EventFileError as error:
        return {"file": file, "error": str(error)}
    inputs = frames.to(next(model.parameters()).device)
    row: dict[str, Any] = {"file": file}
    if isinstance(model, SpikingTransformer):
        steps = model.forward_steps(inputs)[:, 0]
        row["classes"] = _ranked(steps[-1], info, top)
        row["after_step"] = [info.class_names[int(step.argmax())] for step in steps]
    else:
        row["classes"] = _ranked(model(inputs)[0], info, top)
    if hint := _too_long(seconds, framing.window_us / 1e6, file):
        row["hint"] = hint
    return row


def _too_long(seconds: float, window: float, file: str) -> str | None:
    """Advice for a recording that is longer than two of the windows (in seconds) that the model was trained on."""
    if not window or seconds <= 2 * window:
        return None
    told = f"{seconds:.1f} s were taken as one input, but the model was trained on windows of {window:g} s"
    if file.lower().endswith(NMNIST_SUFFIXES):
        return f"{told}; window by window, --stream reads AEDAT files only"
    return f"{told}: classify it window by window with --stream {file} --window {window:g}"


@torch.inference_mode()
def predict_samples(model: nn.Module, info: ModelInfo, count: int, top: int) -> Iterator[dict]:
    """The first `count` samples of the test split of the data set that it was trained on, with their true class."""
    from spikingformer.reports.inputs import checkpoint_data
    from spikingformer.training.distributed import World
    from spikingformer.training.inputs import class_names_of, create_test_loader

    if not info.recipe:
        raise ValueError(
            "--samples: this file does not say what data it was trained on: give files, or a run's checkpoint"
        )
    settings = checkpoint_data(info)
    device = next(model.parameters()).device
    loader, class_names = create_test_loader(
        settings, min(count, 32), 0, device, World(), class_names_of(info), int(info.kwargs["num_classes"])
    )
    done = 0
    for batch in loader.batches():
        for logits, label in zip(model(batch.inputs), batch.labels, strict=True):
            if done == count:
                return
            yield {
                "file": f"{settings.name} test sample {done}",
                "classes": _ranked(logits, info, top),
                "label": class_names[int(label)],
            }
            done += 1
