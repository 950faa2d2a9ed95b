"""Everything a report shows, gathered from a run's folder or model file and from data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spikingformer.energy import PRESETS, OperationCounter
from spikingformer.energy.result import energy_document
from spikingformer.reproduce.curves import published_curves_for
from spikingformer.training.machine import describe_machine
from spikingformer.training.run_folder import METRICS_FILE, read_run_record

from .inputs import OpenedModel, open_model, open_test_part
from .samples import SampleView, choose_samples, view_samples


@dataclass
class ReportData:
    """What the page is made of."""

    name: str
    path: str
    shape: str  # the model in words
    data_name: str
    class_names: tuple[str, ...]
    samples: int
    top1: float  # percent, as all accuracies here
    top5: float
    loss: float
    after_step: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    energy: dict[str, Any]  # an energy document with every preset
    curves: list[dict[str, Any]]  # the run's epoch records
    curves_part: str  # what they were evaluated on
    views: list[SampleView]
    recipe: dict[str, Any] | None
    device: str  # that computed the report
    machine: dict[str, Any]  # it is in, as `describe_machine` says
    trained_on: dict[str, Any] = field(default_factory=dict)  # run.json
    published_curves: dict[str, dict[int, float]] = field(default_factory=dict)  # row -> epoch from 0 -> top-1


def collect(
    target: str, data: str, root: str | None, samples: int, shown: int, batch_size: int, device: str
) -> ReportData:
    """Evaluates the whole test part, counts operations on `samples` of it and looks at `shown` of them.

    Raises ValueError for a missing file, missing data, data that does not fit the model, or a device that is
    not there.
    """
    from spikingformer.training.checkpoint import UNKNOWN_PART
    from spikingformer.training.evaluation import evaluate
    from spikingformer.training.setup import choose_device

    opened = open_model(target)
    place = choose_device(device)
    model = opened.model.to(place)
    loader, class_names, settings = open_test_part(opened, data, root, batch_size, place)
    result = evaluate(model, loader, len(class_names), every_step=True)
    counter = OperationCounter(model, name=opened.name)
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    outputs: list[Tensor] = []
    left = samples
    for batch in loader.batches():
        x, y = batch.inputs[:left], batch.labels[:left]
        outputs.append(counter.add(x, y).argmax(1).cpu())
        labels.append(y.cpu())
        inputs.append(x.cpu() if sum(len(kept) for kept in inputs) < _KEPT else x[:0].cpu())
        left -= len(y)
        if left <= 0:
            break
    facts = counter.finish()
    facts.model = opened.name
    kept = torch.cat(inputs)
    y, predicted = torch.cat(labels)[: len(kept)], torch.cat(outputs)[: len(kept)]
    indices = choose_samples(y, predicted, shown)
    mean, std = _statistics(opened)
    views = view_samples(model, kept[indices].to(place), y[indices], indices, class_names, mean, std) if indices else []
    return ReportData(
        name=opened.name,
        path=str(opened.path or target),
        shape=_shape(opened),
        data_name=settings.name,
        class_names=tuple(class_names),
        samples=result.samples,
        top1=result.top1,
        top5=result.top5,
        loss=result.loss,
        after_step=result.top1_after_step,
        confusion=result.confusion,
        energy=energy_document(facts, "exact", tuple(PRESETS), trained=opened.trained),
        curves=list(_epochs(opened)),
        curves_part=opened.info.evaluated_on if opened.info is not None else UNKNOWN_PART,
        views=views,
        recipe=opened.info.recipe if opened.info is not None else None,
        device=str(place),
        machine=describe_machine(),
        trained_on=_run_record(opened),
        published_curves=published_curves_for(settings.name, opened.name),
    )


def _shape(opened: OpenedModel) -> str:
    c = opened.model.config
    return (
        f"width {c.embed_dim}, {c.depth} blocks, {c.num_heads} heads, T = {c.time_steps}, "
        f"input {c.in_chans} x {c.img_size[0]} x {c.img_size[1]}, downsampling {c.pool}, attention {c.attention_order}"
    )


_KEPT = 1024  # samples kept to choose from


def _statistics(opened: OpenedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (opened.info.mean, opened.info.std) if opened.info is not None else ((), ())


def _epochs(opened: OpenedModel) -> Iterator[dict[str, Any]]:
    """The epoch records of metrics.jsonl beside the model file; a line cut off by a kill is left out."""
    path = opened.path.parent / METRICS_FILE if opened.path is not None else None
    if path is None or not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "epoch":
            yield record


def _run_record(opened: OpenedModel) -> dict[str, Any]:
    return read_run_record(opened.path.parent) if opened.path is not None else {}
