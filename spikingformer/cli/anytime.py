"""`spikingformer evaluate --anytime`: accuracy, mean time steps and energy when confident samples stop early."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikingformer.data.loading import EvaluationLoader
    from spikingformer.export.anytime import AnytimePoint
    from spikingformer.models import SpikingTransformer

COUNTED_SAMPLES = 64  # samples that the energy of a time step is counted on


def curve(model: "SpikingTransformer", loader: "EvaluationLoader") -> "list[AnytimePoint]":
    """The curve over the whole test split; energies are those of the preset "exact"."""
    from spikingformer.energy import count_operations
    from spikingformer.export.anytime import anytime_curve, energy_by_step, step_logits

    few = next(iter(loader.batches())).inputs[:COUNTED_SAMPLES]
    energy = energy_by_step(count_operations(model, [few]))
    logits, labels = step_logits(model, ((batch.inputs, batch.labels) for batch in loader.batches()))
    return anytime_curve(logits, labels, energy_by_step=energy)


def as_json(points: "list[AnytimePoint]") -> list[dict[str, Any]]:
    """Plain data; a threshold of null stands for "all steps"."""
    from dataclasses import asdict

    return [{**asdict(p), "threshold": p.threshold if p.threshold < 1 else None} for p in points]


def text(points: "list[AnytimePoint]") -> str:
    """The curve for a terminal, with a line that explains it."""
    from spikingformer.export.anytime import format_curve

    return (
        "anytime: a sample stops once it reaches the softmax margin; energy is estimated per sample (preset exact, "
        f"rates of at most {COUNTED_SAMPLES} samples)\n" + format_curve(points)
    )
