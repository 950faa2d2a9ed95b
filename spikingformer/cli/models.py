"""`spikingformer models [GLOB]`: lists the models in the registry."""

import argparse
import json
from typing import Any


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "models",
        help="list the models",
        description="Lists the models of this package with their sizes, and the weights that come with it.",
    )
    parser.add_argument("pattern", nargs="?", default="*", help='a glob, for example "*cml_8*" (default: all)')
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import fnmatch

    import timm
    import torch

    from spikingformer.models import VARIANTS
    from spikingformer.weights import shipped_weights

    names = sorted(n for n in VARIANTS if fnmatch.fnmatch(n, args.pattern))
    weights = {n: w for n, w in shipped_weights().items() if w.model in names or fnmatch.fnmatch(n, args.pattern)}
    if not names and not weights:
        raise ValueError(f"no model matches {args.pattern!r}; `spikingformer models` lists all {len(VARIANTS)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        c = VARIANTS[name]
        rows.append(
            {
                "name": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "embed_dim": c.embed_dim,
                "depth": c.depth,
                "num_heads": c.num_heads,
                "input": [c.in_chans, *c.img_size],
                "num_classes": c.num_classes,
                "time_steps": c.time_steps,
                "tau": c.tau,
                "weights": [n for n, w in weights.items() if w.model == name],
            }
        )
    if args.json:
        if not rows:  # the pattern names weights alone
            rows = [{"name": name, "top1": entry.top1, "part": entry.part} for name, entry in weights.items()]
        print(json.dumps(rows, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "parameters", "width", "depth", "heads", "input", "classes", "T", "tau"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            r["name"],
            f"{r['parameters']:,}",
            *(str(r[k]) for k in ("embed_dim", "depth", "num_heads")),
            "x".join(map(str, r["input"])),
            *(str(r[k]) for k in ("num_classes", "time_steps", "tau")),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a pipe has no width: do not cut names
    if rows:
        console.print(table)
    for name, entry in weights.items():
        console.print(
            f"weights that come with the package: {name}, {entry.top1:.2f} % ({entry.part})",
            soft_wrap=True,
            markup=False,
        )
    return 0
