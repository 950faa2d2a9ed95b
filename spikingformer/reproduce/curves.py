"""Learning curves: those of the released training logs, and ours beside them. Epochs are counted from 0."""

import math
from pathlib import Path

from spikingformer.reproduce.ledger import Row, all_tables, published_curves, published_tables
from spikingformer.reproduce.result_files import read_row

Curve = dict[int, float]  # epoch -> top-1 in percent
FIGURE = "learning_curves.png"
_AFTER = (10, 50, 100, 200, 300)  # epochs


def own_curves(results: Path, table: str) -> dict[str, Curve]:
    """Our curves on a published table's data set: of its rows and of our comparisons."""
    curves: dict[str, Curve] = {}
    rows = [row for t in all_tables().values() for row in t.rows if _data_set(row) == table]
    for row in rows:
        found = read_row(results, row.id)
        for run in found.runs if found is not None else ():
            epochs = run.curve_epochs or range(run.epochs)
            if len(run.curve) == len(epochs):
                curves[f"{row.id}, seed {run.seed}"] = dict(zip(epochs, run.curve, strict=True))
    return curves


def _data_set(row: Row) -> str:
    """The published table on whose data a row is run: the folder of its recipe."""
    return row.recipe.split("/")[1]


def published_curves_for(data_set: str, model: str) -> dict[str, Curve]:
    """The released logs on a data set (a recipe's data.name), of this model where there is one, else of all."""
    table = {"gesture": "dvs128"}.get(data_set, data_set)
    curves = {row: curve for row, curve in published_curves().items() if row.split("/")[0] == table}
    same = {row: curve for row, curve in curves.items() if row.split("/")[1].startswith(model)}
    return same or curves


def curves_section(results: Path) -> str:
    """The part of docs/results.md about the curves: the figure, and a table of its figures."""
    lines = [
        "## Learning curves: the released logs, and ours",
        "",
        f"![Top-1 after each epoch of the released logs, and of our runs](images/{FIGURE})",
        "",
        "Top-1 after so many epochs, in percent. Runs of ours follow the lines of the released logs on the same data; "
        "they are other models and budgets unless the name is the same. `spikingformer report RUN` draws the log of "
        "the same model and data beside a run of yours.",
        "",
        f"| run | whose | {' | '.join(f'{n} epochs' for n in _AFTER)} | best | epochs |",
        f"|---|---|{'---:|' * (len(_AFTER) + 2)}",
    ]
    curves = published_curves()
    for table in published_tables():
        logs = {row: curve for row, curve in curves.items() if row.split("/")[0] == table}
        lines += [_line(row, "authors' log", curve) for row, curve in logs.items()]
        lines += [_line(name, "ours", curve) for name, curve in own_curves(results, table).items()]
    return "\n".join([*lines, ""])


def _line(name: str, whose: str, curve: Curve) -> str:
    after = " | ".join(f"{curve[n - 1]:.2f}" if n - 1 in curve else "" for n in _AFTER)
    first, last = min(curve), max(curve)
    epochs = f"{last + 1}" if whose == "ours" or first == 0 else f"{first} to {last}"
    return f"| `{name}` | {whose} | {after} | {max(curve.values()):.2f} | {epochs} |"


def write_curves_figure(results: Path, images: Path) -> Path:
    """One panel a data set with released logs: theirs thin, ours thick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = published_curves()
    tables = [t for t in published_tables().values() if any(row.split("/")[0] == t.name for row in curves)]
    figure = Figure(figsize=(11, 3.9 * math.ceil(len(tables) / 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, table in zip(figure.subplots(math.ceil(len(tables) / 2), 2).flat, tables, strict=False):
        for row, curve in curves.items():
            if row.split("/")[0] == table.name:
                axis.plot(list(curve), list(curve.values()), linewidth=0.8, label=f"{row.split('/')[1]}, log")
        colours: dict[str, str] = {}  # one a row, whatever its seeds
        for name, curve in own_curves(results, table.name).items():
            row = name.partition(", seed")[0]
            label = f"_{name}" if row in colours else f"ours: {row}"  # "_": not in the legend
            colours.setdefault(row, f"C{len(axis.lines)}")
            axis.plot(list(curve), list(curve.values()), ".-", linewidth=1.8, color=colours[row], label=label)
        axis.set(title=table.title, xlabel="epoch", ylabel="top-1, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="lower right")
    images.mkdir(parents=True, exist_ok=True)
    path = images / FIGURE
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return path
