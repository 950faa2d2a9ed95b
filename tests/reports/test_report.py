"""The report: what it holds, and that a browser shows it without an error."""

import argparse
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from spikingformer.cli import report
from spikingformer.data.digits import load_digits
from spikingformer.data.events.show import OFF_COLOUR, ON_COLOUR, colour_frames
from spikingformer.export import describe
from spikingformer.export.hub import save_hub_folder
from spikingformer.export.model_card import CardFacts
from spikingformer.reports.collect import collect
from spikingformer.reports.inputs import data_settings, open_model
from spikingformer.reports.pictures import event_frame
from spikingformer.reports.samples import choose_samples, view_samples
from spikingformer.reports.svg import heat_map, line_chart, ticks
from spikingformer.training.checkpoint import ModelInfo, save_model

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "num_classes": 10, "time_steps": 3}


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *words])
    return args.run(args)


DIGITS = tuple("0123456789")
ESCAPED = tuple(f"digit <{d}>" for d in range(10))  # names that must be escaped


def save_run(folder: Path, channels: int, data: dict, kind: str, classes: tuple[str, ...] = DIGITS) -> Path:
    """A run's folder as training leaves it, with random weights."""
    torch.manual_seed(0)
    kwargs = {**SMALL, "in_chans": channels}
    model = timm.create_model("spikingformer_cml_2_256", **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.bias, 0.7, 0.3)
    info = ModelInfo("spikingformer_cml_2_256", kwargs, classes, (0.3,) * channels, (0.3,) * channels,
                     kind=kind, recipe={"data": data, "epochs": 2})  # fmt: skip
    save_model(folder / "best.safetensors", model.state_dict(), info)
    records = [{"kind": "epoch", "global_step": 10 * e, "epoch": e, "train_loss": 2.0 - e, "loss": 1.5 - e / 2,
                "top1": 40.0 + 20 * e, "firing_rate": 0.1, "energy_mj": 0.002} for e in range(2)]  # fmt: skip
    lines = [json.dumps(r) for r in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "epo']))  # the last line was cut off by a kill
    return folder


def escaped_digits(part: str, size: int):
    return replace(load_digits(part, size), class_names=ESCAPED)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"name": "digits", "image_size": 16, "channels": 1, "validation_fraction": 0.1}
    run = save_run(tmp_path_factory.mktemp("run"), 1, data, "pictures", ESCAPED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikingformer.data.sources.load_digits", escaped_digits)
        assert command(str(run), "--show", "3", "--samples", "64", "--figure", str(run / "overview.svg")) == 0
    return run / "report.html"


class Reader(HTMLParser):
    """Collects what an HTML page refers to and checks that its elements close."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        while self.open:
            if self.open.pop() == tag:
                return
        raise AssertionError(f"</{tag}> closes nothing")


def test_page_is_self_contained(page: Path) -> None:
    reader = Reader()
    html = page.read_text()
    reader.feed(html)
    assert reader.references
    assert all(r.startswith("data:") for r in reader.references)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", html)


@pytest.mark.parametrize(
    "text",
    ["Learning curves", "Accuracy after each time step", "Confusion", "Firing rates", "Energy by component",
     "One count, many prices", "Inside the model", "spike rasters", "attention, block 1", "recipe", "torch",
     "spikingformer-paper", "Break-even", "loss on the held-out training samples",
     "top-1 on the held-out training samples, %", "estimated energy, mJ", "Horowitz", "digit &lt;3&gt;"],
)  # fmt: skip
def test_page_holds(page: Path, text: str) -> None:
    assert text in page.read_text()


def test_untrusted_names_are_escaped(page: Path) -> None:
    assert "digit <3>" not in page.read_text()


def test_figure_is_small_and_self_contained(page: Path) -> None:
    figure = (page.parent / "overview.svg").read_text()
    assert len(figure) < 150_000
    assert all(r.startswith("data:") for r in re.findall(r'href="([^"]*)"', figure))


def test_event_clips_are_animated() -> None:
    torch.manual_seed(0)
    model = timm.create_model("spikingformer_cml_2_256", **SMALL, in_chans=2).eval()
    clip = torch.randint(0, 3, (1, 3, 2, 16, 16)).float()
    (view,) = view_samples(
        model, clip, torch.tensor([4]), [7], [f"digit {d}" for d in range(10)], (0.0, 0.0), (1.0, 1.0)
    )
    assert (view.index, view.label) == (7, "digit 4")
    assert len(set(view.frames)) == len(view.steps) == 3
    assert view.steps[-1][0] == view.prediction
    assert {name for name, _ in view.attention} == {"block 0", "block 1"}
    assert all(len(images) == 3 for _, images in (*view.maps, *view.attention))


def test_events_have_the_colours_of_the_recordings_pictures() -> None:
    frame = torch.zeros(2, 1, 2)
    frame[1, 0, 0] = frame[0, 0, 1] = 1
    image = event_frame(frame, 1.0)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [ON_COLOUR, OFF_COLOUR]
    shown = colour_frames(frame[None].long().numpy())[0, 0]
    assert shown.tolist() == [list(ON_COLOUR), list(OFF_COLOUR)]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        command(str(tmp_path))
    with pytest.raises(ValueError, match="--samples"):
        command(str(tmp_path), "--samples", "0")
    run = save_run(tmp_path, 1, {"name": "digits", "image_size": 16, "channels": 1}, "pictures")
    with pytest.raises(ValueError, match="did you mean"):
        command(str(run), "--data", "digit")


DIGITS = {"name": "digits", "image_size": 16, "channels": 1}


def test_a_model_that_is_no_runs_shows_no_runs_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path, 1, DIGITS, "pictures")
    (run / "run.json").write_text('{"command": "spikingformer train mine.yaml"}')
    model = timm.create_model("spikingformer_cml_2_256", **SMALL, in_chans=1)
    save_hub_folder(model, run / "hub", describe(model), CardFacts())
    monkeypatch.chdir(run)
    found = {}
    for target in ("best.safetensors", "spikingformer_cml_4_384.digits", "hub"):
        data = collect(target, "digits", None, 16, 0, 359, "cpu")
        found[target] = (len(data.curves), bool(data.trained_on), data.path)
    assert found == {
        "best.safetensors": (2, True, "best.safetensors"),
        "spikingformer_cml_4_384.digits": (0, False, "spikingformer_cml_4_384.digits"),
        "hub": (0, False, "hub"),
    }


def test_data_are_read_as_the_checkpoint_was_made_for(tmp_path: Path) -> None:
    opened = open_model(str(save_run(tmp_path, 1, {**DIGITS, "image_size": 8, "root": "elsewhere"}, "pictures")))
    own, other = data_settings(opened, "", None), data_settings(opened, "folder", "x")
    assert (own.name, own.root, own.image_size, own.channels) == ("digits", "elsewhere", 16, 1)
    assert (own.mean, own.std) == ((0.3,), (0.3,))
    assert (other.name, other.root, other.image_size, other.mean) == ("folder", "x", 16, (0.3,))
    assert opened.info is not None
    untold = replace(opened, info=replace(opened.info, recipe=None))
    with pytest.raises(ValueError, match="does not say what it was trained on: add --data NAME"):
        data_settings(untold, "", None)
    wide = replace(opened, info=replace(opened.info, kwargs={**opened.info.kwargs, "img_size": [16, 32]}))
    with pytest.raises(ValueError, match="takes 16x32 .* data sets are read as squares"):
        data_settings(wide, "", None)


def test_chosen_samples_are_of_many_classes_and_some_wrong() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    predictions = torch.tensor([0, 0, 0, 1, 1, 0, 2])
    assert choose_samples(labels, predictions, 4) == [0, 3, 6, 5]
    assert choose_samples(labels, labels, 3) == [0, 3, 5]


def test_charts_of_little_or_odd_data() -> None:
    assert line_chart({"a": []}, "x", "y") == ""
    assert "<circle" in line_chart({"a": [(1.0, 2.0)]}, "x", "y")
    assert "nan" not in line_chart({"a": [(1.0, float("nan")), (2.0, 1.0)]}, "x", "y")
    assert heat_map([], [], "x") == ""
    assert "<rect" in heat_map([("silent", [0.0, 0.0])], ["1", "2"], "x")
    assert ticks(0, 100, 4) == [0, 25, 50, 75, 100]
    assert ticks(1, 1) == [1]


def test_charts_of_one_run_share_their_epochs() -> None:
    def ticks_of(chart: str) -> list[str]:
        return re.findall(r'text-anchor="middle" class="tick"[^>]*>([^<]+)<', chart)

    every, some = [(float(e), 1.0) for e in range(1, 101)], [(30.0, 1.0), (60.0, 2.0)]
    whole = ticks_of(line_chart({"a": every}, "epoch", "loss"))
    assert len(whole) > 2
    assert ticks_of(line_chart({"a": some}, "epoch", "top-1", x_range=(1.0, 100.0))) == whole
    assert ticks_of(line_chart({"a": some}, "epoch", "top-1")) != whole


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """(the page's elements after its script ran, errors that the browser's console showed)."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    words = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--window-size=1400,900", "--virtual-time-budget=3000", "--dump-dom",
        f"file://{page}",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, [line for line in console if re.search(r"[Ee]rror|[Ff]ailed|[Rr]efused|Uncaught", line)]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_an_error(page: Path, width: int, tmp_path: Path) -> None:
    framed = tmp_path / "framed.html"  # a frame, because the browser's own window does not get as narrow as a phone
    framed.write_text(
        f'<!doctype html><link rel="icon" href="data:,"><iframe id=f width={width} height=900 frameborder=0 '
        f'srcdoc="{escape(page.read_text())}"></iframe><script>f.onload = () => {{ const d = f.contentDocument;'
        "document.title = `sideways ${d.documentElement.scrollWidth - f.clientWidth} "
        "marked ${d.querySelectorAll('.said .on').length} width ${f.contentWindow.innerWidth}` }</script>"
    )
    dom, errors = browse(framed, tmp_path / "profile")
    assert errors == []
    found = re.search(r"<title>sideways (-?\d+) marked (\d+) width (\d+)</title>", dom)
    assert found is not None
    sideways, marked, seen = map(int, found.groups())
    assert seen == width
    assert sideways <= 0  # nothing sticks out
    assert marked == 3  # one line a sample: the script ran


def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><title>x</title><script>missing.call()</script>")
    _, errors = browse(broken, tmp_path / "profile")
    assert any("missing is not defined" in e for e in errors)


def test_a_published_runs_log_stands_beside_the_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingformer.reports.page import render
    from spikingformer.reproduce.curves import published_curves_for

    assert "published run" not in page.read_text()  # there is no log for digits
    monkeypatch.setattr("spikingformer.data.sources.load_digits", escaped_digits)
    data = collect(str(page.parent), "", None, 16, 0, 64, "cpu")
    data.published_curves = published_curves_for("cifar10", "spikingformer_cml_4_384")
    html = render(data)
    assert "top-1 beside a published run" in html
    assert "spikingformer_cml_4_384_400e, log" in html
    assert "95.97 % (best of 410 epochs)" in html
    assert "on the test part; this run's line is on the held-out training samples." in html


MACHINE = {"time": "now", "system": "Linux 9", "cpu": "a CPU x2", "cores": 2, "isa": "AVX", "gpu": "a card",
           "versions": {"torch": "1.2.3"}, "commit": "abc", "uncommitted_changes": False}  # fmt: skip


@pytest.mark.parametrize(
    ("noted", "shown"),
    [
        ({"machine": MACHINE}, "system Linux 9, cpu a CPU x2, cores 2, isa AVX, gpu a card, commit abc, torch 1.2.3"),
        (
            {"machine": {"system": "Linux 9", "processor": "x86_64"}, "versions": {"torch": "0"}, "evidence": MACHINE},
            "system Linux 9, cpu a CPU x2, cores 2, isa AVX, gpu a card, commit abc, torch 1.2.3",
        ),
        ({"machine": {"system": "Linux 9", "processor": "x86_64"}}, "system Linux 9, processor x86_64"),
    ],
    ids=["now", "earlier", "first"],
)
def test_the_machine_of_a_run_is_read_from_every_form_of_its_record(noted, shown, page, monkeypatch) -> None:
    from spikingformer.reports.page import render

    monkeypatch.setattr("spikingformer.data.sources.load_digits", escaped_digits)
    (page.parent / "run.json").write_text(json.dumps(noted))
    html = render(collect(str(page.parent), "", None, 16, 0, 64, "cpu"))
    assert f"<dt>trained on</dt><dd>{shown}</dd>" in html
    (page.parent / "run.json").unlink()
