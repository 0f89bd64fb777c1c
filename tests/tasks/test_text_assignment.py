from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_tasks import SIZE, Knowing, Stubborn, tiny_task, write_files

from modstruct.data.downstream.batches import Seed, TaskBatches
from modstruct.data.downstream.karpathy import SPLIT_OF_RUN, CaptionedImage
from modstruct.data.faults import BadSample, TooManyBadSamples
from modstruct.data.transforms.augment import sample_seed
from modstruct.tasks.text_assignment import ANSWERS, SplitImage, TextAssignment

FIRST, SECOND, NEITHER = range(3)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def task(root) -> TextAssignment:
    made = tiny_task(root, "text_assignment")
    for split in ("train", "validation"):
        made.entries(split, None)
    return made


def entries_of(task: TextAssignment, split: str = "train") -> list[SplitImage]:
    return [SplitImage(image, split, number) for number, image in enumerate(task.images[split])]


def seeded(number: int) -> Seed:
    return lambda salt: sample_seed(number, 0, 0, salt)


def assert_sound(task: TextAssignment, entry: SplitImage, seed: Seed | None) -> int:
    asked = task.assignment(entry, seed)
    own, (left, right) = entry.captioned.image, asked.images
    assert asked.text in entry.captioned.captions
    assert left != right
    assert ((left == own), (right == own)) == ((asked.label == FIRST), (asked.label == SECOND))
    captions = {image.image: image.captions for image in task.images[entry.split]}
    assert all(asked.text not in captions[image] for image in asked.images if image != own)
    return asked.label


@given(number=st.integers(0, 22), seed=st.integers(0, 2**63 - 1))
def test_the_text_belongs_where_the_label_says_and_nowhere_else(task, number, seed):
    assert_sound(task, entries_of(task)[number], seeded(seed))


def test_evaluation_asks_soundly_and_always_the_same(task):
    entries = entries_of(task, "validation")
    labels = Counter(assert_sound(task, entry, None) for entry in entries)
    assert max(labels.values()) - min(labels.values()) <= 1
    assert [task.assignment(e, None) for e in entries] == [task.assignment(e, None) for e in entries]


def test_answers_partners_places_and_captions_come_in_equal_shares(task):
    entry = next(entry for entry in entries_of(task) if len(entry.captioned.captions) == 2)
    draws = 6_000
    asked = [task.assignment(entry, seeded(number)) for number in range(draws)]
    others = Counter(image for a in asked for image in a.images if image != entry.captioned.image)
    assert len(others) == len(task.images["train"]) - 1
    shares = [(Counter(a.label for a in asked), 3), (Counter(a.text for a in asked), 2), (others, len(others))]
    for counted, kinds in shares:
        total = counted.total()
        deviation = (total * (1 / kinds) * (1 - 1 / kinds)) ** 0.5
        assert all(abs(n - total / kinds) < 5 * deviation for n in counted.values()), counted


def test_of_three_images_neither_shows_the_two_others():
    recipe_free = TextAssignment.__new__(TextAssignment)
    images = tuple(CaptionedImage(Path(name), (f"a {name}",), n) for n, name in enumerate("abc"))
    recipe_free.images = {"train": images}
    seen = Counter(assert_sound(recipe_free, SplitImage(images[0], "train", 0), seeded(n)) for n in range(50))
    assert set(seen) == {FIRST, SECOND, NEITHER}


def test_a_caption_of_all_images_is_a_bad_sample():
    recipe_free = TextAssignment.__new__(TextAssignment)
    images = tuple(CaptionedImage(Path(name), ("an image",), n) for n, name in enumerate("abc"))
    recipe_free.images = {"train": images}
    with pytest.raises(BadSample, match=r"caption of too many images: a: 'an image'"):
        recipe_free.assignment(SplitImage(images[0], "train", 0), seeded(0))


def test_a_split_of_two_images_is_refused_by_name(root, tmp_path):
    content = json.loads((root / "karpathy" / "dataset_coco.json").read_text())
    content["images"] = [image for image in content["images"] if image["split"] == "val"][:2]
    (tmp_path / "two.json").write_text(json.dumps(content))
    task = tiny_task(root, "text_assignment")
    task.recipe.data.validation.captions = str(tmp_path / "two.json")
    with pytest.raises(ValueError, match=r"data\.validation\.captions = .*two\.json'?: has 2 images .* at least 3"):
        task.entries("validation", None)


def captions_of(task: TextAssignment, split: str, captions: list[str], file: Path) -> None:
    """Give the images of a split these captions in turn."""
    files = getattr(task.recipe.data, split)
    content = json.loads(Path(files.captions).read_text())
    images = [image for image in content["images"] if image["split"] == SPLIT_OF_RUN[split]]
    for number, image in enumerate(images):
        image["sentences"] = [{"raw": captions[number % len(captions)]}]
    file.write_text(json.dumps(content | {"images": images}))
    files.captions = str(file)


def test_a_split_whose_images_share_their_caption_is_refused_before_training(root, tmp_path):
    task = tiny_task(root, "text_assignment")
    captions_of(task, "test", ["same"], tmp_path / "same.json")
    message = r"^data\.test\.captions = '.*same\.json': none of its entries can be used, .*caption of too many images"
    with pytest.raises(ValueError, match=message):
        task.entries("test", None)


def test_a_batch_without_a_usable_entry_is_filled_from_another(root, tmp_path):
    """With one image that lacks the others' caption no text can belong to neither of two."""
    task = tiny_task(root, "text_assignment")
    task.recipe.data.max_bad_share = 1.0
    captions_of(task, "test", ["same"] * 19 + ["another"], tmp_path / "same.json")
    entries = sorted(task.entries("test", None).entries, key=lambda entry: entry.number % 3 != NEITHER)
    result, _ = task.measure(Knowing(3), entries)
    assert result.rows == {"images": 14}


def test_too_many_bad_entries_in_a_row_are_named_by_field_and_remedy(root, tmp_path):
    task = tiny_task(root, "text_assignment")
    captions_of(task, "train", ["same"], tmp_path / "same.json")
    entries = task.entries("train", None).entries
    with pytest.raises(TooManyBadSamples, match=r"^data\.train: 201 entries in a row .*; repair its files or give"):
        TaskBatches(task, entries, task.recipe.data, 12, 3, 0, 1)[0]


def test_every_number_of_processes_asks_the_same(task):
    entries, data = entries_of(task), task.recipe.data
    steps = range(5)  # two epochs and a bit: 23 images, 12 a step

    def batches(processes: int) -> list[dict[str, torch.Tensor]]:
        shares = [TaskBatches(task, entries, data, 12, 3, process, processes) for process in range(processes)]
        parts = [[share[step].tensors for share in shares] for step in steps]
        return [{name: torch.cat([part[name] for part in some]) for name in some[0]} for some in parts]

    alone = batches(1)
    assert alone[0]["image"].shape == (12, 2, 3, SIZE, SIZE)
    for processes in (2, 3, 4):
        for one, other in zip(alone, batches(processes), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(alone[0]["label"], alone[2]["label"])


def test_loader_processes_ask_the_same(task):
    entries = entries_of(task)
    dataset = TaskBatches(task, entries, task.recipe.data, 12, 3, 0, 1)
    sent = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(value, sent[1].tensors[name]) for name, value in dataset[1].tensors.items())
    # The images of the split travel once, not once an entry.
    assert sent.composer.images["train"][0] is sent.entries[0].captioned


def test_each_epoch_asks_anew(task):
    entry = entries_of(task)[0]
    asked = {task.assignment(entry, lambda salt, e=epoch: sample_seed(0, e, 0, salt)) for epoch in range(20)}
    assert len(asked) > 15


def test_the_fingerprint_tells_images_and_captions(root, task):
    entries = task.entries("train", None)
    assert entries.fingerprint == task.entries("train", None).fingerprint
    first = entries.entries[0]
    changed = replace(first, captioned=replace(first.captioned, captions=("another",)))
    assert replace(entries, entries=(changed, *entries.entries[1:])).fingerprint != entries.fingerprint


def test_accuracy_stands_beside_one_third(task):
    entries = entries_of(task, "validation")
    result, predictions = task.measure(Knowing(3), entries)
    assert (result.values["accuracy"].value, result.values["accuracy"].chance) == (1.0, 1 / 3)
    assert result.rows == {"images": len(entries)}
    assert task.score(result) == 1
    said = [{"image_id": e.captioned.image_id, "assignment": ANSWERS[e.number % 3]} for e in entries]
    assert predictions == said
    result, _ = task.measure(Stubborn(3), entries)
    assert result.values["accuracy"].value == sum(e.number % 3 == 0 for e in entries) / len(entries)


def test_the_image_of_each_place_is_the_one_that_is_asked_about(task):
    entry = entries_of(task)[4]

    def told(path: Path) -> Image.Image:
        number = [image.image for image in task.images["train"]].index(path)
        return Image.new("RGB", (40, 50), (number, 0, 0))

    for number in range(10):
        asked = task.assignment(entry, seeded(number))
        made = task.sample(entry, told, seeded(number))
        shown = [task.images["train"][int(view[0, 0, 0])].image for view in made["image"]]
        assert (tuple(shown), made["text"], made["label"]) == (asked.images, asked.text, asked.label)
