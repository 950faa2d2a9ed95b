"""`spikingformer energy`: operations and estimated energy per sample, layer by layer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingformer.cli.device import add_device_argument, refuse_other_than_cpu
from spikingformer.cli.unread import refuse_given

if TYPE_CHECKING:
    from spikingformer.energy import Facts
    from spikingformer.reports.inputs import OpenedModel

PRESET_NAMES = ("exact", "spikingformer-paper", "spikingformer-log", "spikformer-lenient", "spikformer-strict",
                "neurobench")  # fmt: skip
MEMORY_NAMES = ("none", "lemaire2022", "sram64")
BATCH_SIZE = 32
_PRICING = (
    "preset",
    "also",
    "memory",
    "all_rows",
    "csv",
)  # options of the estimate; the next two: of its input, of running a model
_INPUT = ("data", "rates", "assume_rate", "root", "samples")
_RUNNING = ("root", "samples", "batch_size")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "energy",
        help="count operations and estimate energy per sample, layer by layer",
        description=(
            "Counts the operations of a model and estimates their energy. A registered MODEL alone gives the counts "
            "that follow from its shapes, without data. A CHECKPOINT with --data gives measured firing rates, energy "
            "and accuracy. docs/energy.md explains every preset."
        ),
    )
    parser.add_argument(
        "model", metavar="MODEL|CHECKPOINT", help="a registered name, a .safetensors file, or a run's folder"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", nargs="?", const="", metavar="NAME",
        help="measure on the test split of a data set (without NAME: the checkpoint's own; 'random': random input)",
    )  # fmt: skip
    source.add_argument(
        "--rates", type=Path, metavar="FILE", help="JSON with one firing rate per layer, or the output of --json"
    )
    source.add_argument("--assume-rate", type=float, metavar="R", help="one firing rate for all layers, 0 to 1")
    parser.add_argument("--root", metavar="DIR", help="folder that holds the data set")
    parser.add_argument("--samples", type=int, metavar="N", help="samples to count (default: the whole test split)")
    parser.add_argument("--batch-size", type=int, metavar="B", help=f"samples per batch (default: {BATCH_SIZE})")
    add_device_argument(parser)
    parser.add_argument("--preset", choices=PRESET_NAMES, help="rules of counting and pricing (default: exact)")
    parser.add_argument(
        "--also", nargs="+", choices=(*PRESET_NAMES, "all"), default=[], metavar="PRESET",
        help="also print the totals of these presets; 'all' for all of them",
    )  # fmt: skip
    parser.add_argument(
        "--memory",
        choices=MEMORY_NAMES,
        help="also price memory accesses, by this model (default: none)",
    )
    parser.add_argument("--img-size", type=int, metavar="PX", help="picture size, for a registered name")
    parser.add_argument("--in-chans", type=int, metavar="C", help="input channels, for a registered name")
    parser.add_argument("--num-classes", type=int, metavar="K", help="classes, for a registered name")
    parser.add_argument("--time-steps", type=int, metavar="T", help="time steps, for a registered name")
    parser.add_argument("--all-rows", action="store_true", help="also print neuron layers and elementwise operations")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write the layers to a CSV file ('-': print)")
    parser.add_argument(
        "--measure", action="store_true",
        help="measure this machine's energy (NVIDIA: NVML, Linux CPU: RAPL) instead of estimating",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _refuse_what_is_not_read(args)
    if args.measure:
        return _measure(args)
    from spikingformer.energy.result import energy_document, to_csv

    facts, trained, real_data = _facts(args)
    also = tuple(PRESET_NAMES if "all" in args.also else args.also)
    document = energy_document(facts, args.preset or "exact", also, args.memory or "none", trained, real_data)
    if args.json:
        print(json.dumps(document, indent=2))
    elif args.csv is not None:
        text = to_csv(document)
        if str(args.csv) == "-":
            sys.stdout.write(text)
        else:
            args.csv.write_text(text)
    else:
        _print_table(document, args.all_rows)
    return 0


def _refuse_what_is_not_read(args: argparse.Namespace) -> None:
    if args.measure:
        refuse_given(
            args, (*_INPUT, *_PRICING), "--measure runs the model on random input and estimates nothing: omit it"
        )
    elif args.data is None:
        why = "nothing is run without --data: add --data, or omit this"
        refuse_given(args, _RUNNING, why)
        refuse_other_than_cpu(args.device, why)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}")
    if args.csv is not None and not args.csv.parent.is_dir():
        raise ValueError(f"--csv: the folder {args.csv.parent} does not exist: create it, or write elsewhere")
    if args.csv is not None and args.csv.is_dir():
        raise ValueError(f"--csv: {args.csv} is a folder: name a file in it")


def _open(args: argparse.Namespace) -> OpenedModel:
    from spikingformer.reports.inputs import is_checkpoint, open_model

    overrides = _overrides(args)
    if overrides and is_checkpoint(args.model):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in overrides)
        raise ValueError(f"{options}: a checkpoint fixes these: give them only with a registered name")
    return open_model(args.model, **overrides)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {"img_size": args.img_size, "in_chans": args.in_chans, "num_classes": args.num_classes,
             "time_steps": args.time_steps}  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _facts(args: argparse.Namespace) -> tuple[Facts, bool, bool]:
    """(counts, whether the weights are trained, whether the input is real)."""
    from spikingformer.energy import Rates, static_counts, with_rates
    from spikingformer.reports.inputs import is_checkpoint

    if args.data is not None:
        return _measured_facts(args)
    if args.assume_rate is not None and not 0 <= args.assume_rate <= 1:
        raise ValueError(f"--assume-rate must lie in [0, 1], got {args.assume_rate}")
    checkpoint = is_checkpoint(args.model)
    facts = static_counts(_open(args).model) if checkpoint else static_counts(args.model, **_overrides(args))
    facts.model = args.model
    if args.rates is not None:
        facts = with_rates(facts, Rates.read(args.rates))
    elif args.assume_rate is not None:
        facts = with_rates(facts, Rates(default=args.assume_rate, source=f"assumed rate {args.assume_rate:g}"))
    return facts, True, True


def _measured_facts(args: argparse.Namespace) -> tuple[Facts, bool, bool]:
    from rich.console import Console
    from rich.progress import track

    from spikingformer.energy import OperationCounter
    from spikingformer.reports.inputs import evaluation_batches, random_batches
    from spikingformer.training.setup import choose_device

    device, batch_size = choose_device(args.device), args.batch_size or BATCH_SIZE
    opened = _open(args)
    model = opened.model.to(device)
    if args.data == "random":
        batches, total = random_batches(opened, args.samples or batch_size, batch_size)
    else:
        batches, total = evaluation_batches(opened, args.data, args.root, batch_size, args.samples)
    counter = OperationCounter(model, name=args.model)
    console = Console(stderr=True)
    for x, labels in track(batches, "counting", total=-(-total // batch_size), console=console, transient=True):
        counter.add(x.to(device), None if labels is None else labels.to(device))
    return counter.finish(), opened.trained, args.data != "random"


def _measure(args: argparse.Namespace) -> int:
    from spikingformer.energy.measure import measure_model
    from spikingformer.reports.inputs import random_batches
    from spikingformer.training.setup import choose_device

    device, batch_size = choose_device(args.device), args.batch_size or BATCH_SIZE
    opened = _open(args)
    batches, _ = random_batches(opened, batch_size, batch_size)
    x, _ = next(iter(batches))
    result = measure_model(opened.model, x, str(device))
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(result.text())
    return 0 if result.available else 1


def _print_table(document: dict[str, Any], all_rows: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from spikingformer.energy.result import table_rows

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 170
    known = document["totals"]["energy_mj"] is not None
    rows = table_rows(document) if all_rows else table_rows({**document, "neurons": [], "elementwise": []})
    wide = console.width >= (150 if known else 110)
    columns = _COLUMNS if known else _COLUMNS[:6]
    if not wide:
        columns = tuple(c for c in columns if c[0] in _NARROW)
    console.print(_title(document), style="bold", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, _ in columns:
        left = title in ("layer", "operation", "input")
        table.add_column(title, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(text(row) for _, text in columns))
    console.print(table)
    if not wide:
        console.print("(more columns in a wider window, in --json and in --csv)", style="dim")
    totals = document["totals"]
    console.print(f"\n{'dense products':<26}{_short(totals['dense'])}, valid {_short(totals['valid'])}")
    for line in _summary(document):
        console.print(line, soft_wrap=True)
    for w in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {w}", soft_wrap=True)


def _title(document: dict[str, Any]) -> str:
    parts = [document["model"], f"{document['parameters']:,} parameters", f"T = {document['time_steps']}"]
    parts.append(f"input {'x'.join(map(str, document['input_shape']))}")
    if document["samples"]:
        parts.append(f"{document['samples']} samples")
    if document["accuracy"] is not None:
        parts.append(f"accuracy {document['accuracy']:.2%}")
    elif not document["samples"]:
        parts.append(document["source"])
    return ", ".join(parts)


def _summary(document: dict[str, Any]) -> list[str]:
    totals, ann = document["totals"], document["ann"]
    text = []
    if totals["energy_mj"] is not None:
        text.append(
            f"{document['preset']['name']:<26}{totals['energy_mj']:.4g} mJ per sample "
            f"({_short(totals['macs'])} MAC, {_short(totals['acs'])} AC"
            + (f", memory {document['memory_model']})" if document["memory_model"] != "none" else ")")
        )
        for name, value in totals["by_component_mj"].items():
            text.append(f"  {name:<24}{value:.4g} mJ, {value / totals['energy_mj']:.1%}")
        for other in document["also"]:
            text.append(
                f"{other['preset']:<26}{other['energy_mj']:.4g} mJ "
                f"({_short(other['macs'])} MAC, {_short(other['acs'])} AC)"
            )
    text.append(f"{'same network as an ANN':<26}{ann['fp32_mj']:.4g} mJ in FP32, {ann['int8_mj']:.4g} mJ in INT8")
    if document["memory_model"] != "none":
        text.append(f"{'  its memory accesses':<26}{ann['memory_mj']:.4g} mJ in FP32, {document['memory_model']}")
    if ann["mean_rate"] is not None:
        text.append(
            f"{'mean input rate':<26}{ann['mean_rate']:.2%}; break-even at {_break_even(ann['break_even_fp32'])} "
            f"against FP32, {_break_even(ann['break_even_int8'])} against INT8 (arithmetic)"
        )
    return text


def _break_even(rate: float | None) -> str:
    if rate is None:
        return "no rate"
    return f"{rate:.1%}" + (" (cheaper at every rate)" if rate > 1 else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _micro(pj: float | None) -> str:
    return "" if pj is None else f"{pj / 1e6:.3g} uJ"


def _short(value: float | None) -> str:
    """1234567 as 1.23 M."""
    if value is None:
        return ""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.3g}"


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("layer", lambda r: r["name"]),
    ("operation", lambda r: f"{r['op']} {r['shape'] or ''}".strip()),
    ("params", lambda r: _short(r["parameters"])),
    ("dense MACs", lambda r: _short(r["dense"])),
    ("valid", lambda r: _short(r["valid"])),
    ("input", lambda r: r["input_kind"] or ""),
    ("rate", lambda r: _percent(r["input_rate"])),
    ("SOPs", lambda r: _short(r["sops"])),
    ("MACs", lambda r: _short(r["macs"])),
    ("ACs", lambda r: _short(r["acs"])),
    ("updates", lambda r: _short(r["updates"])),
    ("energy", lambda r: _micro(r["energy_pj"])),
    ("share", lambda r: _percent(r["share"])),
)
_NARROW = ("layer", "dense MACs", "input", "rate", "ACs", "energy", "share")
