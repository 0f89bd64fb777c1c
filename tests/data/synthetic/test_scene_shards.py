from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import tarfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

import modstruct.data.synthetic.shards as scene_shards
from modstruct.config import ScenesConfig
from modstruct.data.synthetic.captions import caption, reworded
from modstruct.data.synthetic.drawing import draw
from modstruct.data.synthetic.factors import COLOURS, FILLS, SHAPES, SIZES, Scene
from modstruct.data.synthetic.shards import ScenesPaths, ensure_scenes, scenes_folder
from modstruct.data.synthetic.splits import split_of

SMALL = ScenesConfig(train_samples=25, validation_samples=4, test_samples=4)


def members(pattern: str) -> dict[str, bytes]:
    """Name and content of each file in the shards."""
    found = {}
    for path in webdataset.shardlists.expand_urls(pattern):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def start(cache: str, barrier, results) -> None:
    barrier.wait()
    results.put(ensure_scenes(SMALL, cache, 32))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_shards, "SAMPLES_PER_SHARD", 10)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> ScenesPaths:
    return ensure_scenes(SMALL, tmp_path_factory.mktemp("cache"), 64)


def test_every_sample_is_an_image_a_caption_and_its_factors(paths: ScenesPaths):
    keys = set()
    for split in ("train", "validation", "test"):
        found = members(getattr(paths, split))
        assert len(found) == 3 * getattr(SMALL, f"{split}_samples")
        for name in [name for name in found if name.endswith(".json")]:
            key = name.removesuffix(".json")
            keys.add(key)
            about = json.loads(found[name])
            scene = Scene.from_record(about)
            text = found[f"{key}.txt"].decode()
            assert about["key"] == key
            assert about["split"] == split == split_of(scene)
            assert about["caption"] == text == caption(scene)
            image = Image.open(io.BytesIO(found[f"{key}.jpg"]))
            assert image.size == (64, 64) == (about["width"], about["height"])
            difference = np.asarray(image).astype(int) - np.asarray(draw(scene, 64))
            assert np.abs(difference).mean() < 6  # what JPEG loses
    assert len(keys) == 33


def test_webdataset_reads_the_shards_like_any(paths: ScenesPaths):
    samples = list(webdataset.WebDataset(paths.train, shardshuffle=False, empty_check=False))
    assert len(samples) == SMALL.train_samples
    assert all({"jpg", "txt", "json"} <= set(sample) for sample in samples)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("zero_shot.yaml", COLOURS),
        ("zero_shot_shape.yaml", SHAPES),
        ("zero_shot_size.yaml", SIZES),
        ("zero_shot_fill.yaml", FILLS),
    ],
)
def test_a_class_file_fits_the_labels(paths: ScenesPaths, name: str, values: tuple[str, ...]):
    assert Path(paths.zero_shot).name == "zero_shot.yaml"
    classes = yaml.safe_load(Path(paths.zero_shot).with_name(name).read_text())
    assert set(classes["classes"]) == set(values)
    assert all(template.count("{}") == 1 for template in classes["templates"])
    for member, content in members(paths.train).items():
        if member.endswith(".json"):
            about = json.loads(content)
            label = about[classes["label"]]
            assert label is None if about["count"] > 1 else label in classes["classes"]


def test_reworded_shards_differ_in_one_field_of_the_training_split(paths: ScenesPaths, tmp_path: Path):
    rewords = ensure_scenes(SMALL, tmp_path, 64, rewords=True)
    for split in ("validation", "test"):
        assert Path(getattr(rewords, split)).read_bytes() == Path(getattr(paths, split)).read_bytes()
    plain, found = members(paths.train), members(rewords.train)
    assert plain.keys() == found.keys()
    for name in found:
        if name.endswith(".json"):
            about, before = json.loads(found[name]), json.loads(plain[name])
            text = about.pop("reworded")
            assert about == before
            assert text == reworded(Scene.from_record(about)) != about["caption"]
        else:
            assert found[name] == plain[name]


def test_less_told_changes_captions_alone_and_is_noted(paths: ScenesPaths, tmp_path: Path):
    less = ensure_scenes(replace(SMALL, told=0.4), tmp_path, 64, rewords=True)
    for split in ("train", "validation", "test"):
        plain, found = members(getattr(paths, split)), members(getattr(less, split))
        for name in found:
            if name.endswith(".json"):
                about, before = json.loads(found[name]), json.loads(plain[name])
                scene = Scene.from_record(about)
                assert about.pop("told") == 0.4
                assert about.pop("reworded", None) == (reworded(scene, 0.4) if split == "train" else None)
                assert about.pop("caption") == caption(scene, 0.4) == found[name.replace("json", "txt")].decode()
                del before["caption"]
                assert about == before
            elif name.endswith(".jpg"):
                assert found[name] == plain[name]


def test_shards_of_earlier_versions_are_found_and_get_the_class_files_they_lack(tmp_path: Path):
    folder = scenes_folder(SMALL, tmp_path, 64)
    assert folder.name == "scenes-64px-5bb36a0d40db"  # as 0.1.0 named it
    folder.mkdir()
    ensure_scenes(SMALL, tmp_path, 64)
    assert {path.name for path in folder.iterdir()} == scene_shards.ZERO_SHOT.keys()


@pytest.mark.usefixtures("small_shards")
def test_shards_have_their_size_and_the_pattern_names_them_all(tmp_path: Path):
    paths = ensure_scenes(SMALL, tmp_path, 32)
    assert paths.train.endswith("train-{000000..000002}.tar")
    assert paths.test.endswith("test-000000.tar")
    assert len(members(paths.train)) == 3 * 25
    first = members(paths.train.replace("{000000..000002}", "000000"))
    assert len(first) == 3 * 10
    folder = Path(paths.train).parent
    assert len(list(folder.glob("*.tar"))) == 5


def test_equal_configurations_give_equal_bytes(tmp_path: Path):
    first, second = (ensure_scenes(SMALL, tmp_path / name, 32) for name in ("a", "b"))
    for split in ("train", "validation", "test"):
        assert Path(getattr(first, split)).read_bytes() == Path(getattr(second, split)).read_bytes()


def test_other_configurations_have_other_folders(tmp_path: Path):
    configs = [SMALL, ScenesConfig(25, 4, 5), ScenesConfig(25, 4, 4, seed=1)]
    configs += [replace(SMALL, told=told) for told in (0.5, 0.0)]
    folders = {scenes_folder(c, tmp_path, size, again) for c in configs for size in (32, 64) for again in (False, True)}
    assert len(folders) == 20


def test_the_first_samples_do_not_depend_on_how_many_are_written(tmp_path: Path):
    more = ensure_scenes(ScenesConfig(30, 8, 8), tmp_path, 32)
    fewer = ensure_scenes(SMALL, tmp_path, 32)
    for split in ("train", "validation", "test"):
        longer = members(getattr(more, split))
        assert members(getattr(fewer, split)).items() <= longer.items()


def test_a_second_use_reads_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = ensure_scenes(SMALL, tmp_path, 32)
    monkeypatch.setattr("modstruct.data.synthetic.shards.write_scenes", lambda *arguments: pytest.fail("written twice"))
    assert ensure_scenes(SMALL, tmp_path, 32) == first


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ensure_scenes(SMALL, "~/cache", 32).train.startswith(str(tmp_path / "cache"))


def test_an_interrupted_write_leaves_no_folder_and_the_next_use_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = []

    def interrupted(scene, size):
        drawn.append(scene)
        if len(drawn) == 12:
            raise KeyboardInterrupt
        return draw(scene, size)

    monkeypatch.setattr(scene_shards, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_scenes(SMALL, tmp_path, 32)
    assert not scenes_folder(SMALL, tmp_path, 32).exists()
    monkeypatch.setattr(scene_shards, "draw", draw)
    assert len(members(ensure_scenes(SMALL, tmp_path, 32).train)) == 75


def killed_while_writing(cache: str) -> None:
    scene_shards.draw = lambda scene, size: os._exit(9)
    ensure_scenes(SMALL, cache, 32)


def test_a_killed_process_leaves_only_the_part_folder_which_is_removed_after_a_day(tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(target=killed_while_writing, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    folder = scenes_folder(SMALL, tmp_path, 32)
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left.match(f"{folder.name}.*.part")
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    ensure_scenes(SMALL, tmp_path, 32)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_without_locks_two_hosts_write_side_by_side_and_the_first_folder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("modstruct.data.synthetic.shards.locked", lambda path: nullcontext())
    folder = scenes_folder(SMALL, tmp_path, 32)
    first = {}

    def other_host_meanwhile(scene, size):
        monkeypatch.setattr(scene_shards, "draw", draw)
        ensure_scenes(SMALL, tmp_path, 32)
        first["inode"] = folder.stat().st_ino
        return draw(scene, size)

    monkeypatch.setattr(scene_shards, "draw", other_host_meanwhile)
    paths = ensure_scenes(SMALL, tmp_path, 32)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    assert folder.stat().st_ino == first["inode"]
    assert len(members(paths.train)) == 75


def test_two_processes_at_once_get_the_same_complete_folder(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=start, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert first == second
    assert len(members(first.train)) == 75


def test_a_full_disk_is_named_with_a_remedy_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self, sample):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(ValueError, match=r"data\.cache = .*No space left on device.*make room"):
        ensure_scenes(SMALL, tmp_path, 32)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_a_folder_is_refused_by_name(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache = '.*file/cache'"):
        ensure_scenes(SMALL, tmp_path / "file" / "cache", 32)


@pytest.mark.parametrize("name", ["{a,b}", "*", "[x]"])
def test_a_cache_path_that_would_read_as_a_pattern_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"data\.cache"):
        ensure_scenes(SMALL, tmp_path / name, 32)


def test_images_too_small_to_show_anything_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.vision\.image_size = 8"):
        ensure_scenes(SMALL, tmp_path, 8)
