from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_tasks import SIZE, tiny_task, write_files

from modstruct.data.downstream.karpathy import CaptionedImage
from modstruct.data.faults import TooManyBadSamples
from modstruct.data.transforms.text_views import IGNORED
from modstruct.evaluation.embeddings.source import say_merged
from modstruct.tasks import Task


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def task(root) -> Task:
    return tiny_task(root, "retrieval")


def test_training_takes_every_caption_with_its_image_and_evaluation_every_image_once(task):
    train, test = (task.entries(split, None).entries for split in ("train", "test"))
    assert len({entry.image for entry in train}) == 23
    assert len(train) == len({(entry.image, entry.caption) for entry in train}) > 23
    assert len(test) == len({entry.image for entry in test}) == 20


def test_a_training_batch_says_which_pairs_share_a_image_or_a_caption(task):
    entries = task.entries("train", None).entries
    same = [entry for entry in entries if entry.image == entries[0].image][:2]
    chosen = [*same, next(entry for entry in entries if entry.image != entries[0].image)]
    made = [task.sample(entry, Image.open, lambda salt: 3) | {"slot": 40 + n} for n, entry in enumerate(chosen)]
    batch = task.collate(made)
    assert batch.keys() == {"image", "text", "image_id", "text_id", "slot"}
    assert batch["image"].shape == (3, 3, SIZE, SIZE)
    assert batch["image_id"][0] == batch["image_id"][1] != batch["image_id"][2]
    assert batch["text_id"].unique().numel() == 3
    assert batch["slot"].tolist() == [40, 41, 42]


def test_masked_language_modelling_can_be_learned_on(root, task):
    losses = task.recipe.losses
    losses.masked_language.weight, losses.masked_language.rate = 1.0, 0.5
    masking = tiny_task(root, "retrieval", losses=losses)
    entries = masking.entries("train", None).entries[:8]
    batch = masking.collate([masking.sample(e, Image.open, lambda s: 7) | {"slot": n} for n, e in enumerate(entries)])
    assert batch.keys() >= masking.build_model().batch_fields
    changed = batch["text_masked"] != batch["text"]
    assert 0 < changed.sum() <= (batch["masked_labels"] != IGNORED).sum()


def test_measures_both_stages_and_travels_to_loader_processes(task):
    entries = pickle.loads(pickle.dumps(task)).entries("test", None).entries
    torch.manual_seed(0)
    result, predictions = task.measure(task.build_model().eval(), entries)
    captions = {caption for entry in entries for caption in entry.captions}
    assert result.rows == {"images": 20, "captions": len(captions)}
    assert predictions is None
    for stage in ("", "matched_"):
        for direction in ("text_to_image", "image_to_text"):
            shares = [result.values[f"{stage}{direction}/recall_at_{k}"].value for k in (1, 5, 10)]
            assert 0 <= shares[0] <= shares[1] <= shares[2] <= 1
    assert 0 <= task.score(result) <= 1


def test_an_image_that_cannot_be_read_is_left_out(task, tmp_path):
    entries = list(task.entries("test", None).entries)
    task.recipe.data.max_bad_share = 0.5
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    entries[3] = type(entries[3])(broken, entries[3].captions, entries[3].image_id)
    result, _ = task.measure(task.build_model().eval(), entries)
    assert result.rows["images"] == 19
    task.recipe.data.max_bad_share = 0.01
    with pytest.raises(TooManyBadSamples, match=r"1 of 20 samples of data\.test .*; repair them or raise the share"):
        task.measure(task.build_model().eval(), entries)


def test_a_split_without_a_readable_image_is_refused_by_name(task, tmp_path):
    task.recipe.data.max_bad_share = 1.0
    entries = [replace(entry, image=tmp_path / "none.jpg") for entry in task.entries("test", None).entries]
    with pytest.raises(ValueError, match=r"^data\.test\.images = '.*images': none can be read .*unreadable image"):
        task.measure(task.build_model().eval(), entries)
    with pytest.raises(ValueError, match=r"^--split = 'train': retrieval is measured on whole images"):
        task.measure(task.build_model().eval(), task.entries("train", None).entries, "train")


def test_files_of_equal_bytes_are_one_image_with_all_their_captions(task, tmp_path, caplog):
    say_merged.cache_clear()
    first, *rest = task.entries("test", None).entries
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(first.image.read_bytes())
    torch.manual_seed(0)
    model = task.build_model().eval()
    whole, _ = task.measure(model, [replace(first, captions=(*first.captions, "one more caption")), *rest])
    copied, _ = task.measure(model, [first, CaptionedImage(copy, ("one more caption",), 10**9), *rest])
    assert copied == whole
    assert copied.rows["images"] == 20
    assert "task retrieval: 21 samples hold 20 distinct images" in caplog.text
