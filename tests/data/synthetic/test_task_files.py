"""The built-in tasks as files: written once, in the published formats, and read back by the readers of those."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import modstruct.data.synthetic.shards as scene_shards
from modstruct.config import ScenesConfig
from modstruct.data.downstream.karpathy import read_karpathy
from modstruct.data.downstream.nlvr2 import read_nlvr2
from modstruct.data.downstream.snli_ve import ENTAILMENT_LABELS, read_snli_ve
from modstruct.data.downstream.vqa import read_answer_list, read_vqa
from modstruct.data.synthetic.claims import statement_sets
from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.questions import scene_hypotheses, scene_questions
from modstruct.data.synthetic.task_files import SceneTaskPaths, SceneTaskSizes, ensure_scene_tasks, scene_tasks_folder
from modstruct.tasks.metrics import vqa_accuracy

SMALL = SceneTaskSizes(40, 10, 16, 8, 60, 30, 12, 5)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> SceneTaskPaths:
    return ensure_scene_tasks(ScenesConfig(), tmp_path_factory.mktemp("cache"), 32, SMALL)


def close(path: Path, scene) -> bool:
    """Whether a file shows a scene, but for what JPEG loses."""
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert image.size == (32, 32)
        return np.abs(np.asarray(image).astype(int) - np.asarray(draw(scene, 32))).mean() < 8


def test_the_reader_of_vqa_gives_the_questions_that_were_made(paths: SceneTaskPaths):
    for split in SPLITS:
        found = iter(read_vqa(**vars(paths.vqa[split])).entries)
        for scene, asked in scene_questions(0, split, SMALL.of("questions", split)):
            for question in asked:
                read = next(found)
                assert (read.question, read.question_type) == (question.question, question.question_type)
                assert (read.answers, read.answer_type) == (question.answers, question.answer_type)
                assert close(read.image, scene)
        assert next(found, None) is None


def test_the_true_answers_are_officially_right_and_on_the_answer_list(paths: SceneTaskPaths):
    questions = read_vqa(**vars(paths.vqa["train"])).entries
    true = [question.answer for _, asked in scene_questions(0, "train", SMALL.train_questions) for question in asked]
    predictions = {question.question_id: answer for question, answer in zip(questions, true, strict=True)}
    assert vqa_accuracy(predictions, questions)["overall"] == 1
    assert set(true) <= set(read_answer_list(paths.answer_list))


def test_the_reader_of_nlvr2_gives_the_statements_that_were_made(paths: SceneTaskPaths):
    for split in SPLITS:
        found = {statement.identifier: statement for statement in read_nlvr2(**vars(paths.nlvr2[split])).entries}
        sets = statement_sets(0, split, SMALL.of("statements", split))
        assert len(found) == 8 * len(sets)
        name = {"train": "train", "validation": "dev", "test": "test1"}[split]
        for number, group in enumerate(sets):
            for pair, scenes in enumerate(group.pairs):
                for sentence, text in enumerate(group.sentences):
                    statement = found[f"{name}-{number}-{pair}-{sentence}"]
                    assert statement.sentence == text
                    assert statement.label == group.label(pair, sentence)
                    assert all(map(close, statement.images, scenes))


def test_the_reader_of_snli_ve_gives_the_hypotheses_that_were_made(paths: SceneTaskPaths):
    images = set()
    for split in SPLITS:
        read = read_snli_ve(**vars(paths.snli_ve[split]))
        made = [
            (scene, hypothesis)
            for scene, said in scene_hypotheses(0, split, SMALL.of("hypotheses", split))
            for hypothesis in said
        ]
        assert read.left_out == {}
        for pair, (scene, hypothesis) in zip(read.entries, made, strict=True):
            assert (pair.hypothesis, ENTAILMENT_LABELS[pair.label]) == (hypothesis.text, hypothesis.label)
            assert close(pair.image, scene)
        mine = {pair.image for pair in read.entries}
        assert not mine & images
        images |= mine


def test_the_reader_of_karpathys_files_gives_all_captions(paths: SceneTaskPaths):
    ids = set()
    for split, size in (("train", 12), ("val", 5), ("test", 5)):
        found = read_karpathy(**vars(paths.karpathy), split=split).entries
        assert len(found) == size
        assert all(2 <= len(image.captions) <= 5 for image in found)
        ids |= {image.image_id for image in found}
    assert len(ids) == 22
    published = json.loads(Path(paths.karpathy.captions).read_bytes())["images"]
    assert sum(entry["split"] == "restval" for entry in published) == 3


def test_the_tasks_are_written_once_and_the_same_every_time(paths: SceneTaskPaths, tmp_path: Path, monkeypatch):
    again = ensure_scene_tasks(ScenesConfig(), tmp_path, 32, SMALL)
    first, second = Path(paths.karpathy.captions).parents[1], Path(again.karpathy.captions).parents[1]
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    monkeypatch.setattr(
        "modstruct.data.synthetic.task_files.write_scene_tasks", lambda *arguments: pytest.fail("written twice")
    )
    assert ensure_scene_tasks(ScenesConfig(), tmp_path, 32, SMALL) == again


def test_other_tasks_have_other_folders(tmp_path: Path):
    configs = [(ScenesConfig(), SMALL), (ScenesConfig(seed=1), SMALL), (ScenesConfig(), SceneTaskSizes())]
    folders = {scene_tasks_folder(config, tmp_path, side, sizes) for config, sizes in configs for side in (32, 64)}
    assert len(folders) == 6
    other_shards = ScenesConfig(train_samples=7)
    assert scene_tasks_folder(other_shards, tmp_path, 32, SMALL) in folders


def test_an_interrupted_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def interrupted(scene, size):
        drawn.append(scene)
        if len(drawn) == 30:
            raise KeyboardInterrupt
        return draw(scene, size)

    monkeypatch.setattr(scene_shards, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_scene_tasks(ScenesConfig(), tmp_path, 32, SMALL)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_and_too_small_images_are_refused_by_name(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache = '.*file/cache': the scenes of the downstream tasks cannot"):
        ensure_scene_tasks(ScenesConfig(), tmp_path / "file" / "cache", 32, SMALL)
    with pytest.raises(ValueError, match=r"model\.vision\.image_size = 8"):
        ensure_scene_tasks(ScenesConfig(), tmp_path, 8, SMALL)
