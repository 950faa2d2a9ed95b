"""Soft targets, mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) for pictures and event frames."""

import numpy as np
import torch
import torch.nn.functional as F

from spikingformer.data.randomness import derive_seed
from spikingformer.data.settings import MixSettings


def soft_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """One-hot rows (B, classes), `smoothing` of their weight spread evenly over all classes; float32."""
    return F.one_hot(labels, classes).float() * (1.0 - smoothing) + smoothing / classes


def mix_batch(
    inputs: torch.Tensor, targets: torch.Tensor, settings: MixSettings, seed: int, epoch: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes the batch with its own reverse, one weight for the whole batch (timm's "batch" mode).

    Args:
        inputs: (B, ..., H, W); CutMix cuts the last two axes, so one box for all T and channels of event frames.
        targets: (B, classes) soft targets.
        seed, epoch, step: fix every draw; processes that share them draw the same weight.
    """
    off = settings.off_epoch is not None and epoch >= settings.off_epoch
    if off or (settings.mixup_alpha == 0 and settings.cutmix_alpha == 0):
        return inputs, targets
    generator = np.random.default_rng(derive_seed(seed, epoch, step))
    if generator.random() >= settings.probability:
        return inputs, targets
    cut = settings.cutmix_alpha > 0 and (settings.mixup_alpha == 0 or generator.random() < settings.switch_probability)
    alpha = settings.cutmix_alpha if cut else settings.mixup_alpha
    kept = float(generator.beta(alpha, alpha))
    other = inputs.flip(0)
    if cut:
        height, width = inputs.shape[-2:]
        side = np.sqrt(1 - kept)
        box_height, box_width = int(height * side), int(width * side)
        center_y, center_x = int(generator.integers(height)), int(generator.integers(width))
        top, bottom = max(0, center_y - box_height // 2), min(height, center_y + box_height // 2)
        left, right = max(0, center_x - box_width // 2), min(width, center_x + box_width // 2)
        inputs = inputs.clone()
        inputs[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        inputs = inputs * kept + other * (1 - kept)
    return inputs, targets * kept + targets.flip(0) * (1 - kept)
