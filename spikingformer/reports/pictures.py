"""Tensors as small PNGs in data URIs."""

import base64
import io
import itertools

import torch
from PIL import Image
from torch import Tensor

from spikingformer.data.events.show import OFF_COLOUR, ON_COLOUR

# an own sequential scale, dark to light: readable on white and on black, and in grey
_STOPS = (
    (0.0, (13, 20, 48)),
    (0.25, (39, 60, 139)),
    (0.5, (20, 132, 158)),
    (0.75, (92, 201, 137)),
    (1.0, (252, 239, 148)),
)


def data_uri(image: Image.Image) -> str:
    """A PNG as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def colour_map(values: Tensor, most: float | None = None) -> Image.Image:
    """(H, W) from 0 to `most` (its own maximum) in the scale's colours."""
    v = values.detach().float().cpu()
    v = (v / (most or float(v.max()) or 1.0)).clamp(0, 1)
    out = torch.zeros(*v.shape, 3)
    for (low, a), (high, b) in itertools.pairwise(_STOPS):
        inside = (v >= low) & (v <= high)
        share = ((v - low) / (high - low))[..., None]
        mixed = torch.tensor(a) * (1 - share) + torch.tensor(b) * share
        out = torch.where(inside[..., None], mixed, out)
    return Image.fromarray(out.round().to(torch.uint8).numpy())


def picture(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Image.Image:
    """A normalised picture (C, H, W), C 1 or 3 (else the mean over channels in grey)."""
    shape = (-1, 1, 1)
    y = x.detach().float().cpu()
    if len(mean) == len(y):
        y = y * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    else:
        low, high = y.min(), y.max()
        y = (y - low) / (high - low).clamp_min(1e-12)
    y = (y.clamp(0, 1) * 255).round().to(torch.uint8)
    if len(y) == 3:
        return Image.fromarray(y.permute(1, 2, 0).contiguous().numpy())
    return Image.fromarray((y[0] if len(y) == 1 else y.float().mean(0).to(torch.uint8)).contiguous().numpy())


def event_frame(x: Tensor, most: float) -> Image.Image:
    """One frame (2, H, W) of event counts, ON red and OFF blue on white; `most`: count of full colour."""
    strength = (x.detach().float().cpu() / max(most, 1e-12)).clamp(0, 1).sqrt()
    off, on = strength[0][..., None], strength[1][..., None]
    white = torch.tensor([255.0, 255.0, 255.0])
    ink = torch.where(on >= off, torch.tensor(ON_COLOUR).float(), torch.tensor(OFF_COLOUR).float())
    share = torch.maximum(on, off)
    return Image.fromarray((white * (1 - share) + ink * share).round().to(torch.uint8).numpy())


def raster(spikes: Tensor) -> Image.Image:
    """(neurons, T) zeros and ones: dark marks on white, a thin line between time steps."""
    n, t = spikes.shape
    w, h = max(5, 72 // t), 3  # pixels of a cell
    image = torch.full((n * h, t * w), 255, dtype=torch.uint8)
    for step in range(1, t):
        image[:, step * w] = 222
    for neuron, step in spikes.detach().cpu().nonzero().tolist():
        image[neuron * h : neuron * h + h - 1, step * w + 2 : (step + 1) * w - 1] = 24
    return Image.fromarray(image.numpy())


def overlay(base: Image.Image, heat: Tensor, most: float | None = None) -> Image.Image:
    """A heat map (h, w) over a picture, scaled to it (at most 112 pixels a side), mostly covering it."""
    small = base.convert("L").convert("RGB")
    small.thumbnail((112, 112), Image.Resampling.BILINEAR)
    colours = colour_map(heat, most).resize(small.size, Image.Resampling.BICUBIC)
    return Image.blend(small, colours, 0.72)
