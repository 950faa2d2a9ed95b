"""Models small enough for tests, in which every neuron fires."""

import timm
import torch
from torch import Tensor, nn


def small(name: str = "spikingformer_cml_4_384", batch: int = 3, **kwargs) -> tuple[nn.Module, Tensor]:
    """A narrow model in eval mode and its input (events: four steps). Odd widths: nothing fits a vector or a word."""
    torch.manual_seed(0)
    kwargs = {"embed_dim": 72, "depth": 2, "num_heads": 3, "num_classes": 7, "img_size": 32, "time_steps": 3} | kwargs
    model = timm.create_model(name, **kwargs)
    size = model.config.img_size
    events = model.config.takes_events
    x = (
        torch.poisson(torch.full((batch, 4, 2, *size), 0.5))
        if events
        else torch.randn(batch, model.config.in_chans, *size)
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.8, 2.0)
            nn.init.uniform_(m.bias, 0.1, 0.8)
            m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x
