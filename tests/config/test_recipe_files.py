"""Recipes as text, and what a resumed run may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from modstruct.config import (
    DataConfig,
    FinetuneRecipe,
    GeometryConfig,
    LossesConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    Source,
    TextConfig,
    TrainConfig,
    ViewsConfig,
)
from modstruct.config.recipe_files import CHANGEABLE, check_resumable, recipe_to_dict, recipe_to_yaml


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def with_change(tree: dict, name: str, value: object) -> dict:
    """A copy of the nested dictionary with one leaf set by its dotted name."""
    head, _, rest = name.partition(".")
    return tree | {head: with_change(tree[head], rest, value) if rest else value}


def test_a_recipe_is_written_as_plain_yaml():
    sources = [Source("a-{000..009}.tar", 2.0), Source("pipe:cat b.tar", index="indexes/b")]
    recipe = replace(Recipe(), data=DataConfig(train=sources), views=ViewsConfig(crop_scale=(0.2, 0.9)))
    read = yaml.safe_load(recipe_to_yaml(recipe))
    assert read == recipe_to_dict(recipe)
    assert read["views"]["crop_scale"] == [0.2, 0.9]
    piped = {"shards": "pipe:cat b.tar", "index": "indexes/b"}
    assert {name: value for name, value in read["data"]["train"][1].items() if value is not None} == piped
    assert "!" not in recipe_to_yaml(recipe)  # no tag that asks a reader to build an object


def test_the_same_recipe_resumes():
    check_resumable(recipe_to_dict(Recipe()), Recipe())


@pytest.mark.parametrize("allowed", CHANGEABLE)
def test_every_field_named_as_changeable_may_change(allowed):
    found = 0
    for recipe in (Recipe(), FinetuneRecipe()):
        saved = recipe_to_dict(recipe)
        for name in leaves(saved):
            if name == allowed or name.startswith(f"{allowed}."):
                check_resumable(with_change(saved, name, "another"), recipe)
                found += 1
    assert found


def test_the_script_that_made_a_run_resumes_it():
    for saved, recipe, script in ((FinetuneRecipe(), Recipe(), "finetune"), (Recipe(), FinetuneRecipe(), "pretrain")):
        told = rf"^--resume = '{saved.output}': a run of launch_scripts/{script}\.py, which resumes it"
        with pytest.raises(ValueError, match=told):
            check_resumable(recipe_to_dict(saved), recipe)


def complaint(saved: dict) -> str | None:
    """What the default recipe hears when it resumes from a checkpoint made with `saved`; None if it may."""
    try:
        check_resumable(saved, Recipe())
    except ValueError as refusal:
        return str(refusal)
    return None


def test_every_other_field_may_not_change_and_is_named():
    saved = recipe_to_dict(Recipe())
    complaints = {name: complaint(with_change(saved, name, "another")) for name in leaves(saved) if name != "schema"}
    refused = {name for name, said in complaints.items() if said is not None}
    for name in refused:
        assert complaints[name].startswith(f"{name} = ")
        assert "made with 'another'" in complaints[name]
    # What decides the weights' shapes, the order and the views of the data, the loss or the optimizer's state.
    assert {
        "data.shuffle_block",
        "data.scenes.seed",
        "tokenizer.vocab_size",
        "views.eda_rate",
        "model.embed_dim",
        "losses.bridge.t",
        "optimizer.weight_decay",
        "optimizer.betas",
        "train.global_batch",
        "train.seed",
        "train.precision",
    } <= refused


@pytest.mark.parametrize(
    "changed",
    [
        replace(Recipe(), model=ModelConfig(text=TextConfig(layers=5))),
        replace(Recipe(), losses=LossesConfig(geometry=GeometryConfig(weight=0.25))),
        replace(Recipe(), train=TrainConfig(steps=1000, global_batch=512)),
        replace(Recipe(), data=DataConfig(shuffle_window=7)),
    ],
)
def test_a_recipe_changed_in_what_the_checkpoint_rests_on_is_refused(changed):
    with pytest.raises(ValueError, match=r"a resumed run may change only optimizer\.learning_rate, "):
        check_resumable(recipe_to_dict(Recipe()), changed)


def test_all_that_differs_from_the_checkpoint_is_named_at_once():
    changed = replace(Recipe(), train=TrainConfig(steps=1000, global_batch=512), data=DataConfig(shuffle_window=7))
    now, before = DataConfig().shuffle_window, Recipe().train.global_batch
    told = rf"^data\.shuffle_window = 7: .* made with {now}, and other values of train\.global_batch \(was {before}\)"
    with pytest.raises(ValueError, match=told):
        check_resumable(recipe_to_dict(Recipe()), changed)


def test_sources_keep_their_filters():
    of_all, own = DataConfig(train=["a", "b"], filter="w > 0"), [Source("a", filter="w > 0"), Source("b", filter="")]
    for before, now in ((of_all, DataConfig(train="ab", filter="w > 0")), (DataConfig(own), DataConfig(own))):
        check_resumable(recipe_to_dict(replace(Recipe(), data=before)), replace(Recipe(), data=now))
    other = replace(Recipe(), data=DataConfig([own[0], Source("b", filter="w > 3")]))
    message = r"^data\.train\.filter = \['w > 0', 'w > 3'\]: the checkpoint was made with \['w > 0', ''\]"
    with pytest.raises(ValueError, match=message):
        check_resumable(recipe_to_dict(replace(Recipe(), data=DataConfig(own))), other)


def test_a_longer_and_slower_run_resumes():
    longer = replace(
        Recipe(),
        train=TrainConfig(epochs=2.0, max_skipped_steps=3),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0),
        output="runs/moved",
    )
    check_resumable(recipe_to_dict(Recipe()), longer)


def test_a_field_that_one_version_lacks_is_named():
    saved = recipe_to_dict(Recipe())
    del saved["views"]["flip"]
    with pytest.raises(ValueError, match=r"views\.flip = True: the checkpoint's recipe lacks this field"):
        check_resumable(saved, Recipe())
    saved = with_change(recipe_to_dict(Recipe()), "views.flip", True) | {"gone": 1}
    with pytest.raises(ValueError, match=r"gone = 1: the checkpoint was made with it"):
        check_resumable(saved, Recipe())
