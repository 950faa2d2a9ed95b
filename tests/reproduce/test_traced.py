"""Figures in README and docs come from results files."""

import json
from pathlib import Path

import pytest

from tests.reproduce.traced import look_up, untraced_figures, wrong_traces

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
EVERY_FIGURE_TRACED = ["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_traces_lead_to_the_figures_shown(page):
    assert wrong_traces((ROOT / page).read_text(), ROOT) == []


@pytest.mark.parametrize("page", EVERY_FIGURE_TRACED)
def test_every_figure_is_traced(page):
    assert untraced_figures((ROOT / page).read_text()) == []


@pytest.fixture
def root(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"speed": 812.4, "runs": [{"share": 0.8731}], "name": "x"}))
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "812 pictures/s <!-- from: r.json#speed -->",
        "812.4 pictures/s, 87.3 % <!-- from: r.json#speed r.json#runs.0.share*100 -->",
        "| 812 | <!-- from: r.json#speed --> |",
    ],
)
def test_right_traces_pass(root, line):
    assert wrong_traces(line, root) == untraced_figures(line) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("813 pictures/s <!-- from: r.json#speed -->", "is 812.4, which the line does not show"),
        ("812.3 pictures/s <!-- from: r.json#speed -->", "does not show"),
        ("87.3 % <!-- from: r.json#runs.1.share*100 -->", "no '1' in r.json"),
        ("87.3 % <!-- from: r.json#name -->", "expected a number, got 'x'"),
        ("87.3 % <!-- from: gone.json#name -->", "no file gone.json"),
    ],
)
def test_wrong_traces_fail(root, line, why):
    assert why in wrong_traces(line, root)[0]


def test_look_up_scales(root):
    assert look_up(root, "r.json#runs.0.share*100") == pytest.approx(87.31)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("It takes 3.4 ms.", True),
        ("95.95 % top-1", True),
        ("1,234 pictures/s", True),
        ("95.95 % top-1 <!-- fact: arXiv 2305.05954 -->", False),
        ("Python 3.11 and T = 4 steps", False),
        ("`--leg-seconds 540 s`", False),
        ("```\n95 %\n```", False),
    ],
)
def test_figures_are_recognised(line, found):
    assert bool(untraced_figures(line)) == found
