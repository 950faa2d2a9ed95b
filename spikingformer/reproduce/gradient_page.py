"""docs/precise_gradient.md and its figures: the routing study and the comparison of both orders."""

from pathlib import Path
from typing import Any

from spikingformer.reproduce.ledger import own_tables
from spikingformer.reproduce.result_files import read_row, read_study
from spikingformer.reproduce.results_page import NOTICE, comparison_lines
from spikingformer.training.machine import hardware

STUDIES = {"digits": "digits", "cifar10": "CIFAR-10"}
_SIZES = {"digits": "digits/spikingformer_cml", "cifar10": "cifar10/spikingformer_cml_small_cpu"}  # recipes

_HEAD = f"""# Where the gradient goes: fire then pool, pool then fire

{NOTICE}

A downsampling stage is convolution, BatchNorm, neuron and a 3x3 max-pool. *Fire then pool* (the order of Spikformer,
here `pool="sps"`) pools spikes, all of them 0 or 1: the first of several equal ones in reading order gets the
gradient, whatever the currents were, and a silent window sends it to its first position. *Pool then fire* (CML,
[arXiv 2305.05954](https://arxiv.org/abs/2305.05954), `pool="cml"`) pools currents: the largest gets the gradient. The
paper calls this gradient precise. What follows measures how often and how far the two differ.

- **Elsewhere**: share of pooling windows (an output position, channel, sample and time step) in which fire-then-pool
  sends its gradient to a current smaller than the window's largest; "of firing" counts only windows with a spike.
- **Silent / several**: share of windows without a spike, and with more than one.
- **Cosine, currents**: between the two orders' gradients with respect to the same currents, at the same weights, under
  the same gradient from above.
- **Cosine, weights**: between the gradients of the stage's convolution when the whole network runs in one order or the
  other, same weights, same samples, same loss.

Train mode, BatchNorm with batch statistics. Code: `spikingformer/reproduce/routing.py`.
"""


def gradient_page(results: Path) -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    for name, title in STUDIES.items():
        study = read_study(results, f"gradient_routing_{name}")
        parts.append(_study_section(name, title, study))
    parts.append(_comparison_section(results))
    return "\n".join(parts).rstrip() + "\n"


def _study_section(name: str, title: str, study: dict[str, Any] | None) -> str:
    if study is None:
        needs = "" if name == "digits" else " --data FOLDER"
        return f"## On {title}\n\nNot run: `python -m benchmarks.gradient_routing {name}{needs}`\n"
    machine = study["machine"]
    first = study["runs"][0]
    lines = [
        f"## On {title}",
        "",
        f"![Share elsewhere and cosines over training, {title}](images/gradient_routing_{name}.png)",
        "",
        f"`{study['command']}`: {first['steps']} steps of {first['batch_size']} "
        f"({first['steps'] / first['steps_per_epoch']:.2f} epochs), every model in the size of "
        f"`recipes/{_SIZES[name]}.yaml`, measured on {first['measured_on']} "
        f"training samples, one seed a model, on {hardware(machine)}, "
        f"torch {machine['versions']['torch']}, commit {machine['commit']}.",
        "",
        "| trained as | step | stage | elsewhere | of firing | silent | several | cosine, currents | cosine, weights |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in study["runs"]:
        for m in _shown(run["measurements"]):
            for s in m["stages"]:
                lines.append(
                    f"| {run['model']} | {m['step']} | {s['stage'].removeprefix('stem.stages.')} | "
                    f"{_percent(s['elsewhere'])} | {_percent(s['elsewhere_among_firing'])} | {_percent(s['silent'])} | "
                    f"{_percent(s['several'])} | {s['current_cosine']:.3f} | {s['weight_cosine']:.3f} |"
                )
    top1 = ", ".join(f"{r['model']} {r['test_top1']:.2f} %" for r in study["runs"])
    lines.append("")
    lines.append(f"Top-1 on the test part at the end (these runs only serve to change the weights): {top1}.")
    lines += ["", *_reading(study)]
    return "\n".join(lines) + "\n"


def _shown(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before training, and after it."""
    return [measurements[0], measurements[-1]]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _range(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    low, high = scale * min(values), scale * max(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _reading(study: dict[str, Any]) -> list[str]:
    """The ranges over models and stages, before and after training."""
    lines = []
    for index, when in ((0, "Before training"), (-1, "At the end")):
        stages = [s for r in study["runs"] for s in r["measurements"][index]["stages"]]
        firing = [s["elsewhere_among_firing"] for s in stages if s["elsewhere_among_firing"] is not None]
        missed = _range([s["elsewhere"] for s in stages], 100, 1)
        text = f"- {when}, fire-then-pool misses the largest current in {missed} % of windows"
        if firing:
            text += f" ({_range(firing, 100, 1)} % of those that fire)"
        lines.append(
            text
            + f"; the cosine of the two gradients is {_range([s['current_cosine'] for s in stages])} on currents and "
            f"{_range([s['weight_cosine'] for s in stages])} on weights."
        )
    return lines


def _comparison_section(results: Path) -> str:
    lines = ["## Does it matter for accuracy, and what does it cost?", ""]
    for name in ("orders-digits", "orders-cifar10", "orders-cifar10-longer"):
        table = own_tables()[name]
        found = comparison_lines(table, results)
        state = found or [
            f"Not run in full: `spikingformer reproduce {name}`; [results](results.md) say what it needs.",
            "",
        ]
        if not found and any(read_row(results, r.id) for r in table.rows):
            state = [
                f"Unfinished, see [results](results.md); `spikingformer reproduce {name}` continues.",
                "",
            ]
        lines += [f"{table.title}:", "", *state]
    lines.append(
        "Energy is estimated by the preset `exact` on the best weights; the mean input rate is the share of a\n"
        "product's inputs that are spikes. In a downsampling stage, pool then fire has a quarter of the neurons."
    )
    return "\n".join(lines) + "\n"


def write_figures(results: Path, images: Path) -> list[Path]:
    """One figure for each study that has been run."""
    written = []
    for name, title in STUDIES.items():
        study = read_study(results, f"gradient_routing_{name}")
        if study is not None:
            images.mkdir(parents=True, exist_ok=True)
            path = images / f"gradient_routing_{name}.png"
            _draw(study, title, path)
            written.append(path)
    return written


_PANELS = (("elsewhere", "windows whose gradient\ngoes elsewhere"), ("current_cosine", "cosine, currents"),
           ("weight_cosine", "cosine, weights"))  # fmt: skip


def _draw(study: dict[str, Any], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    colours = {r["model"]: f"C{i}" for i, r in enumerate(study["runs"])}
    for run in study["runs"]:
        steps = [m["step"] for m in run["measurements"]]
        for k, stage in enumerate(run["measurements"][0]["stages"]):
            style = ("-", "--", ":", "-.")[k % 4]
            label = f"{run['model']}, stage {stage['stage'].rsplit('.', 1)[-1]}"
            for axis, (key, _) in zip(axes, _PANELS, strict=True):
                values = [m["stages"][k][key] for m in run["measurements"]]
                axis.plot(steps, values, style, color=colours[run["model"]], label=label, marker=".", linewidth=1.2)
    for axis, (_, ylabel) in zip(axes, _PANELS, strict=True):
        axis.set_xlabel("optimiser step")
        axis.set_ylabel(ylabel)
        axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.suptitle(f"Fire then pool against pool then fire, {title}", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})
