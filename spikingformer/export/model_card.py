"""The model card (README.md) of a hub folder, written from the records of a run: it states nothing else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikingformer.training.checkpoint import UNKNOWN_PART, ModelInfo

from .metadata import ExportMetadata

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class EnergyEstimate:
    """The energy estimate that a card quotes."""

    preset: str
    millijoules: float  # a sample
    samples: int  # that the firing rates were measured on
    memory_model: str = "none"

    @classmethod
    def read(cls, path: str | Path) -> "EnergyEstimate":
        """From the output of `spikingformer energy CHECKPOINT --data --json`.

        Raises ValueError for another file, and for an estimate without measured rates.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            found = cls(
                document["preset"]["name"],
                document["totals"]["energy_mj"],
                document["samples"],
                document["memory_model"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = "does not exist" if isinstance(error, FileNotFoundError) else "is not an energy estimate"
            raise ValueError(
                f"{path} {problem}: write it with `spikingformer energy CHECKPOINT --data --json`"
            ) from None
        if found.millijoules is None or not found.samples:
            raise ValueError(f"{path} has no measured rates: estimate the energy with --data")
        return found


@dataclass(frozen=True)
class CardFacts:
    """What a card states in addition to the metadata."""

    licence: str = "apache-2.0"  # of the weights, by its name on the hub
    data: str = ""  # name of the training set
    metrics: Mapping[str, float] = field(default_factory=dict)  # of these weights, e.g. top1 in percent
    epoch: int | None = None  # counted from 0
    recipe: Mapping[str, Any] | None = None
    source: str = ""  # "trained", or how the weights were made
    versions: Mapping[str, str] = field(default_factory=dict)
    energy: EnergyEstimate | None = None
    part: str = UNKNOWN_PART  # what the metrics were counted on

    @classmethod
    def from_run(
        cls, info: ModelInfo, energy: EnergyEstimate | None = None, licence: str = "apache-2.0"
    ) -> "CardFacts":
        """The facts in a checkpoint about the run that wrote it."""
        data = (info.recipe or {}).get("data", {}).get("name", "")
        return cls(
            licence,
            data,
            info.metrics,
            info.epoch,
            info.recipe,
            info.source,
            info.versions,
            energy,
            info.evaluated_on,
        )


def model_card(metadata: ExportMetadata, facts: CardFacts) -> str:
    """The card as Markdown with the hub's header. Facts that were not recorded are named as such."""
    config, pre = metadata.config, metadata.preprocessing
    rows, columns = pre.size
    task = "event frames (B, T, C, H, W)" if metadata.input == "events" else "pictures (B, C, H, W)"
    parts = [
        _header(metadata, facts),
        f"# {metadata.model}\n\nA spiking vision transformer, {config['depth']} blocks of width {config['embed_dim']}, "
        f"{metadata.time_steps} time steps, for {task} of {rows}x{columns} with {config['in_chans']} channels.",
        "## Use\n\n```python\nimport timm\nimport spikingformer  # registers the model\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER: where this card lies\n```',
        "## Data\n\n"
        f"Trained on {facts.data or NOT_RECORDED}; {len(metadata.class_names)} classes: {_names(metadata)}.\n\n"
        f"Input: {_input(metadata)}.",
        _results(facts),
        _energy(facts.energy),
        _making(metadata, facts),
        f"## Licence\n\n{facts.licence}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(metadata: ExportMetadata, facts: CardFacts) -> str:
    lines = ["library_name: timm", f"license: {facts.licence}"]
    tags = ["image-classification", "timm", "spikingformer", "spiking-neural-network"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    if facts.data:
        lines += ["datasets:", f"- {facts.data}"]
    return "---\n" + "\n".join(lines) + "\n---"


def _results(facts: CardFacts) -> str:
    if not facts.metrics:
        return f"## Accuracy\n\n{NOT_RECORDED.capitalize()}."
    epoch = "" if facts.epoch is None else f", after epoch {facts.epoch + 1}"  # counted as the console does
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in facts.metrics.items())
    return f"## Accuracy\n\nOne run{epoch}. Counted on the {facts.part}.\n\n| | |\n|---|---|\n{table}"


def _energy(energy: EnergyEstimate | None) -> str:
    if energy is None:
        return "## Energy\n\nNot estimated."
    memory = "without memory accesses" if energy.memory_model == "none" else f"memory by {energy.memory_model}"
    return (
        f"## Energy\n\n{energy.millijoules:.4g} mJ per sample, estimated, not measured: "
        f"preset `{energy.preset}` (45 nm, FP32), {memory}, firing rates of {energy.samples} samples."
    )


def _making(metadata: ExportMetadata, facts: CardFacts) -> str:
    lines = [
        f"- source: {facts.source or NOT_RECORDED}",
        f"- checkpoint SHA-256: {metadata.checkpoint_sha256 or NOT_RECORDED}",
    ]
    lines += [f"- {name} {version}" for name, version in facts.versions.items()]
    text = "## How it was made\n\n" + "\n".join(lines)
    if facts.recipe is not None:
        text += "\n\n```json\n" + json.dumps(facts.recipe, indent=1) + "\n```"
    return text


def _input(metadata: ExportMetadata) -> str:
    pre = metadata.preprocessing
    rows, columns = pre.size
    if metadata.input == "events":
        return f"raw counts of events, channel 0 OFF, 1 ON, summed into {rows}x{columns} cells"
    return (
        f"short side to {rows} / {pre.crop_fraction:g}, centre crop, {pre.interpolation}; "
        f"mean {_numbers(pre.mean)}, std {_numbers(pre.std)}"
    )


def _names(metadata: ExportMetadata, shown: int = 20) -> str:
    names = metadata.class_names
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
