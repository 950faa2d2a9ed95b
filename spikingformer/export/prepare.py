"""What every format does first: checks the example, folds BatchNorm and checks the fold."""

import copy
import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spikingformer.models import SpikingTransformer

from .fold import FoldCheck, check_fold, fold_batch_norm, is_folded
from .metadata import FORMAT_KEY, ExportMetadata, describe


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how close it is to the model."""

    path: Path
    size_bytes: int
    metadata: ExportMetadata
    fold: FoldCheck | None  # None: not checked, or the model was folded already
    logit_difference: float | None  # largest |file - folded model| on the example; None: not run here

    def summary(self) -> dict[str, object]:
        """Flat, for JSON."""
        return {
            "path": str(self.path),
            "megabytes": round(self.size_bytes / 1e6, 3),
            "model": self.metadata.model,
            "time_steps": self.metadata.time_steps,
            "streaming": self.metadata.streaming,
            "checkpoint_sha256": self.metadata.checkpoint_sha256,
            "fold_logit_difference": None if self.fold is None else self.fold.logit_difference,
            "fold_spikes_different": None if self.fold is None else self.fold.spikes_different,
            "logit_difference": self.logit_difference,
        }


@dataclass(frozen=True)
class Prepared:
    """A model ready to be written: folded, in eval mode, on the CPU, with an example of at least two samples."""

    model: SpikingTransformer
    example: Tensor
    metadata: ExportMetadata
    fold: FoldCheck | None

    def frame(self) -> Tensor:
        """The first time step of the example, (B, C, H, W)."""
        return self.example[:, 0] if self.example.ndim == 5 else self.example

    def report(self, path: Path, size_bytes: int | None = None, logit_difference: float | None = None) -> ExportReport:
        size = path.stat().st_size if size_bytes is None else size_bytes
        return ExportReport(path, size, self.metadata, self.fold, logit_difference)


def default_example(model: SpikingTransformer, batch: int = 2) -> Tensor:
    """A random input of the model's own size: pictures (B, C, H, W), or event counts (B, T, C, H, W)."""
    c = model.config
    generator = torch.Generator().manual_seed(0)
    if c.takes_events:
        counts = torch.rand((batch, model.time_steps, 2, *c.img_size), generator=generator)
        return (counts > 0.9).float() * 2
    return torch.randn((batch, c.in_chans, *c.img_size), generator=generator)


def prepare(
    model: SpikingTransformer,
    example: Tensor | None,
    metadata: ExportMetadata | None,
    check: bool = True,
    streaming: bool = False,
) -> Prepared:
    """Folds a copy of `model` and checks the fold on one sample of `example` in float64.

    `example`: an input of the model (default: a random one of its own size). Raises ValueError for an input that the
    model does not take, and RuntimeError if the folded model fires other spikes.
    """
    described = describe(model) if metadata is None else metadata
    x = default_example(model) if example is None else example.detach().cpu().float()
    model.frames(x)  # raises for a shape that the model does not take
    if not x.isfinite().all():
        raise ValueError("the example holds NaN or infinity: give an input as the model sees it")
    check_weights(model)
    own = copy.deepcopy(model).cpu()  # the caller's keeps its device and precision
    if is_folded(own):
        folded, fold = own, None
    else:
        folded = fold_batch_norm(own)
        fold = check_fold(own, x[:1]) if check else None
    if fold is not None and not fold.exact:
        raise RuntimeError(
            f"folding BatchNorm changed {fold.spikes_different} of {fold.spikes} neuron updates and the logits by "
            f"{fold.logit_difference:.3g} in float64: do not use this file; please report it"
        )
    if x.ndim == 5:
        described = replace(described, input="events", time_steps=x.shape[1])
    described = replace(described, streaming=streaming)
    size = (x.shape[-2], x.shape[-1])
    if size != described.preprocessing.size:
        described = replace(described, preprocessing=replace(described.preprocessing, size=size))
    return Prepared(folded.float().eval(), x if len(x) > 1 else torch.cat([x, x]), described, fold)


def check_weights(model: SpikingTransformer) -> None:
    """Raises ValueError for NaN and infinite weights. Spikes would hide them: the predictions would look normal."""
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{len(broken)} of the model's weights hold NaN or infinity, first {broken[0]}: export a checkpoint from "
            "before its training diverged"
        )


def checked_target(path: str | Path, suffix: str) -> Path:
    """`path` as a Path. Raises ValueError for another suffix, a missing folder, and an existing file that export did
    not write, so that a checkpoint is not overwritten by a typo."""
    target = Path(path)
    if target.suffix != suffix:
        raise ValueError(
            f"this format is written to *{suffix} files, got {target.name!r}: name it {target.stem}{suffix}"
        )
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist: create it, or write elsewhere")
    if target.exists() and not _was_exported(target):
        raise ValueError(
            f"{target} exists and was not written by `spikingformer export`: name another file, or move it"
        )
    return target


def _was_exported(path: Path) -> bool:
    if not path.is_file():
        return False
    if not path.stat().st_size:
        return True  # nothing to lose
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(FORMAT_KEY.encode()) >= 0
