"""The report's page: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from spikingformer.training.machine import machine_in_words, machine_of_run

from . import svg
from .collect import ReportData
from .samples import SampleView

MATRIX_CLASSES = 40  # more classes are listed instead


def render(data: ReportData) -> str:
    """The whole page."""
    left = [
        _section("Learning curves", _curves(data), "What the run wrote after each epoch."),
        _section("Confusion", _confusion(data), f"{data.samples:,} samples of the test part; rows are the true class."),
        _section("One count, many prices", _ladder(data), _LADDER_NOTE),
    ]
    right = [
        _section("Accuracy after each time step", _after_step(data), _STEPS_NOTE),
        _section("Firing rates", _rates(data), _RATES_NOTE),
        _section("Energy by component", _components(data), _ENERGY_NOTE),
    ]  # fmt: skip
    below = [
        _wide("Inside the model", _samples(data), _SAMPLES_NOTE),
        _wide("Layers", _layer_table(data), "Per sample; the same figures as <code>spikingformer energy --csv</code>."),
        _wide("How this was made", _provenance(data), ""),
    ]
    columns = "".join(f"<div class=column>{''.join(c)}</div>" for c in (left, right))
    style, script = ((files(__package__) / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(data.name)} on {escape(data.data_name)}</title><style>{style}</style></head>"
        f"<body><main>{_summary(data)}{columns}{''.join(below)}</main><script>{script}</script></body></html>\n"
    )


_STEPS_NOTE = "Reading the head after fewer time steps: what an early exit would cost."
_RATES_NOTE = (
    "Share of neurons that fire, layer by time step. Stronger colour is busier; the scale ends at the busiest cell."
)
_ENERGY_NOTE = (
    "An estimate in 45 nm energies under the preset <code>exact</code>, not a measurement. "
    "Synapses and attention scale with the firing rates; the rest does not."
)
_LADDER_NOTE = (
    "The same counted operations under each preset, beside the same network run once without spikes. "
    "<code>docs/energy.md</code> says what each counts."
)
_SAMPLES_NOTE = (
    "Spikes averaged over channels, the attention that each token receives, and single neurons, time step by time step."
)


def _section(title: str, body: str, note: str) -> str:
    return f"<section><h2>{title}</h2><p class=note>{note}</p>{body}</section>" if body else ""


def _wide(title: str, body: str, note: str) -> str:
    note = f"<p class=note>{note}</p>" if note else ""
    return f'<section class="wide"><h2>{title}</h2>{note}{body}</section>' if body else ""


def _figure(chart: str) -> str:
    return f"<figure>{chart}</figure>" if chart else ""


def _summary(data: ReportData) -> str:
    energy = data.energy
    updates = sum(n["updates"] for n in energy["neurons"])
    rate = sum(n["firing_rate"] * n["updates"] for n in energy["neurons"]) / updates if updates else 0.0
    tiles = [
        (f"{data.top1:.2f} %", f"top-1 on {data.samples:,} test samples"),
        (f"{rate:.1%}", "of neurons fire at a time step"),
        (f"{_mj(energy['totals']['energy_mj'])}", "estimated a sample"),
        (f"{_mj(energy['ann']['fp32_mj'])}", "the same network in FP32"),
        (f"{energy['parameters'] / 1e6:.2f} M", "parameters"),
        (str(energy["time_steps"]), "time steps"),
    ]
    cells = "".join(f"<div class=tile><b>{value}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    notes = "".join(f"<li>{escape(w)}</li>" for w in energy["warnings"])
    return (
        f'<header class="wide"><h1>{escape(data.name)} <small>on {escape(data.data_name)}</small></h1>'
        f"<p class=shape>{escape(data.shape)}</p>"
        f"<div class=tiles>{cells}</div>" + (f"<ul class=warnings>{notes}</ul>" if notes else "") + "</header>"
    )


def _curves(data: ReportData) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(r["epoch"] + 1, float(r[key])) for r in data.curves if isinstance(r.get(key), (int, float))]

    charts = []
    epochs = [float(r["epoch"] + 1) for r in data.curves]
    part = f"on the {data.curves_part}"
    loss = {"training loss": points("train_loss"), f"loss {part}": points("loss")}
    for series, label, low in (
        (loss, "loss", 0.0),
        ({"top-1, %": points("top1")}, f"top-1 {part}, %", None),
        ({"firing rate, %": [(e, 100 * v) for e, v in points("firing_rate")]}, "firing rate, %", 0.0),
        ({"estimated energy, mJ": points("energy_mj")}, "estimated energy, mJ a sample", 0.0),
    ):
        kept = {name: line for name, line in series.items() if line}
        if kept:
            charts.append(_figure(svg.line_chart(kept, "epoch", label, low, (min(epochs), max(epochs)))))
    if data.published_curves and points("top1"):
        # the chart tells a few lines apart: ours and the best of the logs
        name, curve = max(data.published_curves.items(), key=lambda item: max(item[1].values()))
        series = {"this run": points("top1"), f"{name.split('/')[-1]}, log": [(e + 1, v) for e, v in curve.items()]}
        charts.append(_figure(svg.line_chart(series, "epoch", "top-1 beside a published run's log, %")))
        charts.append(f"<p class=note>{_published_note(data)}</p>")
    return "".join(charts)


def _published_note(data: ReportData) -> str:
    logs = ", ".join(
        f"<code>{escape(name)}</code> {max(curve.values()):.2f} % (best of {len(curve)} epochs)"
        for name, curve in data.published_curves.items()
    )
    return (
        f"Training logs that the authors released for this data set: {logs}, on the test part; this run's line is on "
        f"the {data.curves_part}. Compare only where model, data and budget are the same; all of them are in "
        "<code>docs/results.md</code>."
    )


def _after_step(data: ReportData) -> str:
    if len(data.after_step) < 2:
        return ""
    points = [(t + 1, accuracy) for t, accuracy in enumerate(data.after_step)]
    return _figure(svg.line_chart({"top-1, %": points}, "time step", "top-1, %"))


def _confusion(data: ReportData) -> str:
    names = data.class_names
    if len(names) <= MATRIX_CLASSES:
        return _figure(svg.confusion(data.confusion, names))
    rows = [(names[i], row[i] / max(sum(row), 1), sum(row)) for i, row in enumerate(data.confusion)]
    worst = sorted((r for r in rows if r[2]), key=lambda r: r[1])[:20]
    return _figure(
        svg.bar_chart([(n[:20], a, f"{a:.0%} of {c}") for n, a, c in worst], label="lowest class accuracies")
    )


def _rates(data: ReportData) -> str:
    rows = [(n["name"].removesuffix(".lif"), n["rate_by_step"]) for n in data.energy["neurons"]]
    steps = max((len(r) for _, r in rows), default=0)
    silent = [n for n in data.energy["neurons"] if n["silent_channels"] or n["saturated_channels"]]
    notes = [
        f"<li><code>{escape(n['name'])}</code>: " + ", ".join(
            f"{len(n[key])} of {n['shape'].split('x')[0]} channels {what} fired"
            for key, what in (("silent_channels", "never"), ("saturated_channels", "always")) if n[key]) + "</li>"
        for n in silent
    ]  # fmt: skip
    summary = f"<summary>{len(silent)} layers with silent or saturated channels</summary>"
    extra = f"<details>{summary}<ul>{''.join(notes)}</ul></details>"
    chart = _figure(svg.heat_map(rows, [str(t + 1) for t in range(steps)], "time step", label="firing rates"))
    return chart + (extra if silent else "")


def _group(name: str) -> str:
    """Part of the model that a line belongs to: stem, blocks.0.attn, ..., head."""
    parts = name.split(":")[0].split(".")
    if parts[0] == "blocks":
        return ".".join(parts[:3]) if len(parts) > 2 else f"{parts[0]}.{parts[1]}.add"
    return parts[0] if parts[0] == "stem" else "head"


def _components(data: ReportData) -> str:
    sums: dict[str, dict[str, float]] = {}
    for line in data.energy["lines"]:
        parts = sums.setdefault(_group(line["name"]), {})
        parts[line["component"]] = parts.get(line["component"], 0.0) + line["energy_pj"] / 1e6
    order = sorted(
        sums, key=lambda g: (g != "stem", g == "head", [int(p) if p.isdigit() else -1 for p in g.split(".")], g)
    )
    chart = svg.stacked_bars([(g, sums[g]) for g in order], "uJ", "energy by part of the model, uJ a sample")
    total = data.energy["totals"]["energy_mj"]
    items = "".join(
        f"<li><span>{c}</span><b>{_mj(v)}</b><i>{v / total:.1%}</i></li>"
        for c, v in data.energy["totals"]["by_component_mj"].items()
    )
    return _figure(chart) + f"<p class=axis>µJ a sample</p><ul class=list>{items}</ul>"


def _ladder(data: ReportData) -> str:
    energy = data.energy
    rows = [("exact", energy["totals"]["energy_mj"])]
    rows += [(p["preset"], p["energy_mj"]) for p in energy["also"]]
    ann = energy["ann"]
    rows += [("ANN, INT8", ann["int8_mj"]), ("ANN, FP32", ann["fp32_mj"])]
    chart = svg.bar_chart([(n, v, _mj(v)) for n, v in rows], label="energy a sample under each preset")
    if ann["mean_rate"] is None:
        return _figure(chart)
    even = [_even(ann[f"break_even_{k}"]) for k in ("fp32", "int8")]
    return _figure(chart) + (
        f"<p>Mean input rate <b>{ann['mean_rate']:.1%}</b>. Break-even against the same network in FP32: {even[0]}; "
        f"in INT8: {even[1]}.</p>"
    )


def _even(rate: float | None) -> str:
    if rate is None:
        return "<b>never</b>, the fixed part alone costs more"
    return f"<b>{rate:.1%}</b>" + (" (every rate pays)" if rate > 1 else "")


def _film(images: list[str], alt: str, steps: int) -> str:
    """Images that the slider steps through; one image stands still."""
    if len(images) == 1 or len(set(images)) == 1:
        return f'<img src="{images[0]}" alt="{escape(alt)}">'
    shown = "".join(
        f'<img src="{uri}" alt="{escape(alt)}, step {t + 1}"{"" if t == 0 else " hidden"}>'
        for t, uri in enumerate(images)
    )
    return f'<div class=film data-steps="{steps}">{shown}</div>'


def _samples(data: ReportData) -> str:
    if not data.views:
        return ""
    steps = max(len(v.steps) for v in data.views)
    control = (
        '<div class=control><button type=button id=play aria-pressed=true>Pause</button>'
        f'<label>time step <input id=step type=range min=1 max={steps} value=1></label><output id=now>1</output></div>'
    )  # fmt: skip
    return control + "".join(_sample(v, steps, i == 0) for i, v in enumerate(data.views))


def _sample(view: SampleView, steps: int, opened: bool) -> str:
    verdict = "right" if view.right else "wrong"
    said = "".join(
        f'<li data-step="{t + 1}"><span>{t + 1}</span><b>{escape(name)}</b>'
        f'<meter min=0 max=1 value="{p:.4f}"></meter><i>{p:.0%}</i></li>'
        for t, (name, p) in enumerate(view.steps)
    )
    maps = "".join(
        f"<figure>{_film(images, f'spikes of {name}', steps)}<figcaption>{escape(name)}</figcaption></figure>"
        for name, images in view.maps
    )
    attention = "".join(
        f"<figure>{_film(images, f'attention in {name}', steps)}"
        f"<figcaption>attention, {escape(name)}</figcaption></figure>"
        for name, images in view.attention
    )
    rasters = "".join(
        f'<figure class=raster><img src="{uri}" alt="spike raster of {escape(name)}">'
        f"<figcaption>{escape(name)}<br>{rate:.1%}</figcaption></figure>"
        for name, uri, rate in view.rasters
    )
    return (
        f'<article><h3>{escape(view.label)} <small class="{verdict}">{verdict}'
        + ("" if view.right else f": taken for {escape(view.prediction)}")
        + f"</small></h3><div class=sample><figure class=input>{_film(view.frames, 'input', steps)}"
        f"<figcaption>sample {view.index}</figcaption></figure><ol class=said>{said}</ol>"
        f'<div class=strip>{attention}</div><div class="strip maps">{maps}</div>'
        f"<details{' open' if opened else ''}><summary>spike rasters (neurons down, time steps across)</summary>"
        f"<div class=strip>{rasters}</div></details>"
        "</div></article>"
    )


def _layer_table(data: ReportData) -> str:
    head = ("layer", "operation", "input", "rate", "dense", "SOPs", "MACs", "ACs", "energy", "share")
    rows = []
    for r in data.energy["layers"]:
        cells = [f"<td><code>{escape(r['name'])}</code></td>", f"<td>{escape(r['op'] + ' ' + r['shape'])}</td>",
                 f"<td>{r['input_kind']}</td>"]  # fmt: skip
        cells += [f"<td class=n>{value}</td>" for value in (
            f"{r['input_rate']:.1%}", _si(r["dense"]), _si(r["sops"]), _si(r["macs"]), _si(r["acs"]),
            f"{r['energy_pj'] / 1e6:.3g} µJ", f"{r['share']:.1%}")]  # fmt: skip
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = "".join(f"<th>{h}</th>" for h in head)
    return (
        f"<details><summary>{len(rows)} products</summary><div class=scroll><table><thead><tr>{header}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _provenance(data: ReportData) -> str:
    about: list[tuple[str, Any]] = [("model file", data.path), ("written", time.strftime("%Y-%m-%d %H:%M %Z"))]
    about += [("written on", machine_in_words(data.machine)), ("device", data.device)]
    about += [("samples counted for energy", data.energy["samples"])]
    if data.trained_on.get("command"):
        about.append(("trained with", " ".join(map(str, data.trained_on["command"]))))
    if machine := machine_of_run(data.trained_on):
        about.append(("trained on", machine_in_words(machine)))
    if data.trained_on.get("started"):
        about.append(("training started", data.trained_on["started"]))
    body = f"<dl>{_pairs(about)}</dl>"
    if data.recipe is not None:
        recipe = escape(yaml.safe_dump(data.recipe, sort_keys=False))
        body += f"<details><summary>recipe</summary><pre>{recipe}</pre></details>"
    constants = [(n, f"{c['value']:g} {c['unit']} ({c['source']})") for n, c in data.energy["constants"].items()]
    return body + f"<details><summary>energy constants and their source</summary><dl>{_pairs(constants)}</dl></details>"


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    return "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in rows)


def _mj(value: float) -> str:
    return f"{value:.3g} mJ" if value >= 0.1 else f"{value * 1e3:.3g} µJ"


def _si(value: float) -> str:
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.3g}"
