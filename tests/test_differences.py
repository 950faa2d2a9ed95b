"""docs/differences.md: each row states an effect, and nothing that is dropped or deliberately changed is missing."""

import re
from pathlib import Path

import pytest
import timm

import spikingformer  # noqa: F401  (registers the models)
from spikingformer.data.settings import AugmentSettings, DataSettings
from spikingformer.official import DROPPED

PAGE = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| published |"))
]


# as the page's head promises: exact, measured (where?), or that it is not known
EFFECT = re.compile(
    r"^exact: \S|^none where |^see \[\w+\]\(|^measured in .+(\(below\)|\]\(|`)|\bnot (measured|run)\b|"
    r"\bcompare with nothing published$"
)


def test_every_row_says_what_the_effect_is():
    assert len(ROWS) >= 15
    assert [row[0] for row in ROWS if len(row) != 3 or not EFFECT.search(row[2])] == []


@pytest.mark.parametrize(
    "effect",
    ["", "exact: ", "better", "measured", "measured here", "accuracy measured", "none", "see results", "unmeasured"],
)
def test_an_effect_that_says_nothing_is_found(effect):
    assert not EFFECT.search(effect)


@pytest.mark.parametrize("key", ["block.0.norm1.weight", "block.0.norm2.bias", "norm.weight", "pos_embed"])
def test_keys_that_conversion_drops_are_named(key):
    assert any(re.fullmatch(rule, key) for rule in DROPPED)
    assert f"`{next(p for p in key.split('.') if p not in ('block', '0'))}`" in PAGE


@pytest.mark.parametrize("name", ["qk_scale", "sr_ratios", "attn_drop", "proj_drop"])
def test_ignored_arguments_are_named_and_refused(name):
    assert f"`{name}`" in PAGE
    with pytest.raises(TypeError, match="unknown argument"):
        timm.create_model("spikingformer_4_256", **{name: 0.1})


@pytest.mark.parametrize(
    ("setting", "settings"),
    [("flip_swaps_labels", AugmentSettings), ("engine", AugmentSettings), ("validation_fraction", DataSettings)],
)
def test_options_that_the_page_names_exist(setting, settings):
    assert f".{setting}" in PAGE
    assert setting in settings.model_fields
