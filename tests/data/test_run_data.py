"""The data of a run: found by the recipe, and no more captions read for its tokenizer than its trainer wants."""

from __future__ import annotations

from types import SimpleNamespace

from crafted_shards import write_shards

from modstruct.config import Recipe
from modstruct.data import run_data


def test_a_tokenizer_learns_from_as_many_captions_as_its_trainer_wants(tmp_path, monkeypatch):
    recipe = Recipe()
    recipe.data.train = write_shards(tmp_path / "shards", [20])
    recipe.data.validation = recipe.data.eval = recipe.data.zero_shot = None
    recipe.data.cache = str(tmp_path / "cache")
    learned = []
    monkeypatch.setattr(run_data, "TRAINING_CAPTIONS", 4)

    def build(config, captions, *_):
        learned.extend(captions())
        return SimpleNamespace(model=b"")

    monkeypatch.setattr(run_data, "build_tokenizer", build)
    run_data.open_run_data(recipe, 8)
    assert learned == ["thing 0", "thing 5", "thing 10", "thing 15"]
