"""Recipes of earlier versions: fields that are renamed, removed, added, or have another default."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import pytest

from modstruct.config import FinetuneRecipe, LossesConfig, Recipe, ViewsConfig, migrations
from modstruct.config.fusion import FusionConfig
from modstruct.config.losses import BridgeConfig
from modstruct.config.migrations import Change, migrate, migrate_checkpoint, migrate_method
from modstruct.config.model import ModelConfig
from modstruct.config.recipe_files import check_resumable, recipe_to_dict


@dataclass
class NewerLosses(LossesConfig):
    """A loss was added."""

    invented: BridgeConfig = field(default_factory=BridgeConfig)


@dataclass
class NewerRecipe(Recipe):
    """A field was added, whose default is not what the older code did."""

    colours: int = 3
    losses: NewerLosses = field(default_factory=NewerLosses)


@pytest.fixture
def added(monkeypatch):
    change = Change(
        added={"colours": 1}, renamed={"data.old_cache": "data.cache"}, removed=("views.gone",), values={}, defaults={}
    )
    monkeypatch.setitem(migrations.CHANGES, 2, change)


def older() -> dict:
    saved = recipe_to_dict(Recipe())
    del saved["schema"]
    return saved


def test_a_field_younger_than_the_checkpoint_has_the_value_of_the_older_code(added):
    check_resumable(older(), NewerRecipe(colours=1))
    with pytest.raises(ValueError, match="colours = 3: the checkpoint was made with 1"):
        check_resumable(older(), NewerRecipe())


def test_checkpoints_of_version_3_keep_eda_and_the_captions_of_their_time():
    for whole in (Recipe(), FinetuneRecipe()):
        saved = recipe_to_dict(whole) | {"schema": 3}
        del saved["views"]["text"], saved["data"]["scenes"]["told"]
        check_resumable(saved, whole)
        before = migrate_checkpoint(saved)
        assert (before["views"]["text"], before["data"]["scenes"]["told"]) == ("eda", 1.0)
    changed = replace(Recipe(), views=ViewsConfig(text="reworded"))
    with pytest.raises(ValueError, match=r"views\.text = 'reworded': the checkpoint was made with 'eda'"):
        check_resumable(recipe_to_dict(Recipe()) | {"schema": 3}, changed)


def test_a_fine_tuning_checkpoint_gets_no_section_that_it_lacks(monkeypatch):
    change = Change(added={"model.colours": 1, "views.colours": 1}, added_to_pretraining={"data.colours": 1})
    monkeypatch.setattr(migrations, "CHANGES", {2: change})
    saved = {"task": {}, "views": {}, "data": {}}
    assert migrate_checkpoint(saved) == saved | {"views": {"colours": 1}, "schema": migrations.SCHEMA}
    assert migrate_checkpoint({"data": {}})["data"] == {"colours": 1}


def test_a_field_without_a_migration_is_refused_by_name():
    with pytest.raises(ValueError, match="colours = 1: the checkpoint's recipe lacks this field"):
        check_resumable(older(), NewerRecipe(colours=1))


def test_a_younger_loss_is_off_and_needs_no_migration(added):
    check_resumable(older(), NewerRecipe(colours=1, losses=NewerLosses(invented=BridgeConfig(t=0.5))))
    with pytest.raises(ValueError, match=r"losses\.invented\.weight = 1\.0: the checkpoint is older than this loss"):
        check_resumable(older(), NewerRecipe(colours=1, losses=NewerLosses(invented=BridgeConfig(weight=1.0))))


def test_renamed_and_removed_fields(added):
    saved = migrate_checkpoint({"data": {"old_cache": "here"}, "views": {"gone": 1, "flip": True}})
    assert saved["data"]["cache"] == "here"
    assert "old_cache" not in saved["data"]
    assert saved["views"] == {"flip": True, "text": "eda", "on": "loader"}


def test_a_field_under_both_its_names_is_refused(added):
    with pytest.raises(
        ValueError, match=r"data\.old_cache = 'a': it is now called data\.cache, which the recipe gives"
    ):
        migrate({"data": {"old_cache": "a", "cache": "b"}})


def test_version_1():
    saved = {"losses": {"queue_contrast": {"positives": "picture"}}}
    migrated = migrate(saved)
    assert migrated["losses"] == {"queue_contrast": {"positives": "image"}, "contrastive": {"weight": 1.0}}
    assert saved == {"losses": {"queue_contrast": {"positives": "picture"}}}
    assert migrate(migrated) == migrated
    assert "contrastive" not in migrate(saved | {"task": {}})["losses"]
    assert migrate_method(saved) == {"losses": {"queue_contrast": {"positives": "image"}}}
    assert migrate({"losses": 3}) == {"losses": 3, "schema": migrations.SCHEMA}  # the parser refuses it


def test_a_section_that_a_change_leaves_empty_goes_too(monkeypatch):
    change = Change(renamed={"old.part.field": "data.field"}, removed=("gone.field",))
    monkeypatch.setitem(migrations.CHANGES, 2, change)
    old = {"old": {"part": {"field": 1}}, "gone": {"field": 2, "kept": 3}}
    assert migrate_method(old) == {"data": {"field": 1}, "gone": {"kept": 3}}


def test_a_method_is_migrated_from_its_own_version():
    old = {"losses": {"queue_contrast": {"positives": "picture"}}}
    assert migrate_method({"schema": migrations.SCHEMA, **old}) == old
    with pytest.raises(ValueError, match="schema = 99"):
        migrate_method({"schema": 99})


@pytest.mark.parametrize("scale", [7.0, float("nan"), float("inf")])
def test_scales_beyond_what_the_losses_were_checked_at_are_refused(scale):
    with pytest.raises(ValueError, match=r"model\.logit_scale_max = .*at most ln 1000"):
        ModelConfig(logit_scale_max=scale)
    with pytest.raises(ValueError, match=r"fusion\.temperature_range = \[0\.0001, 0\.5\]"):
        FusionConfig(temperature_range=(1e-4, 0.5))


@pytest.mark.parametrize("version", [0, migrations.SCHEMA + 1, "2", None, True])
def test_an_unknown_version_is_refused(version):
    with pytest.raises(ValueError, match="schema = "):
        migrate({"schema": version})


def test_every_loss_is_off_by_default():
    assert not any(getattr(LossesConfig(), loss.name).weight for loss in fields(LossesConfig))
