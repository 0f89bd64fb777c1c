"""The model card says what was trained and measured, and shows texts of others as they are."""

from __future__ import annotations

import re
from dataclasses import replace

import yaml

from modstruct.config import ContrastiveConfig, GeometryConfig, LossesConfig, Recipe
from modstruct.evaluation.result import Result, share
from modstruct.training.model_card import shown, write_card

SIGNED = "https://me:secret@host/0.tar?signature=secret"
HOSTILE = "/data/<img src=x onerror=alert(1)>|[a](http://b)\n# `title`\x1b[2J.tar"


def test_it_holds_the_essentials_and_no_text_of_the_recipe_is_markdown(tmp_path):
    (tmp_path / "image.onnx").touch()
    recipe = Recipe(output="runs/star_wars")
    losses = LossesConfig(contrastive=ContrastiveConfig(1.0, in_modal=True), geometry=GeometryConfig(0.0625))
    recipe = replace(recipe, losses=losses, data=replace(recipe.data, train=HOSTILE, eval=SIGNED))
    found = Result("retrieval", "a|b", {"R@1```": share(0.125, low=0.1, high=0.15, chance=0.01)}, title="Text -> image")
    write_card(tmp_path, recipe, 300, {"a|b": [found]}, ["image.independent_head.weight"])
    card = (tmp_path / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["library_name"] == "onnx"
    table = dict(re.findall(r"^\| (\w[\w ]*) \| (.*) \|$", body, re.M))
    assert table["Samples seen"] == "76,800 (300 steps of 256)"
    assert table["Weights"] == "after step 300"
    assert table["Objective"] == shown("1 x contrastive (in_modal True) + 0.0625 x geometry")
    assert table["Data"] == shown(HOSTILE)
    assert "12.50  10.00 to 15.00" in body
    assert body.startswith("# star\\_wars\n")
    assert "Left out of this form: image.independent" in body
    outside = body
    while "```" in outside:  # what lies in fences is shown as it is
        fence = outside[outside.index("```") :].split("\n")[0].rstrip("abcdefghijklmnopqrstuvwxyz")
        before, _, rest = outside.partition(fence)
        outside = before + rest.partition(f"\n{fence}\n")[2]
    assert "<img" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\x1b" not in body
    assert "eval: https://host/0.tar?..." in body
    assert "secret" not in card
    assert body.count("\n# ") == 0
