from __future__ import annotations

import os
from pathlib import Path

import pytest
from published_samples import touched

from modstruct.data.downstream.image_folders import ImageFolders


def test_each_folder_is_listed_once_however_many_images_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [tmp_path / folder / f"{number}.jpg" for folder in ("a", "b") for number in range(50)]
    touched(*names)
    listed, looked_at = [], []
    listdir, stat = os.listdir, os.stat
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(Path(path)) or listdir(path))
    monkeypatch.setattr(os, "stat", lambda path, *rest, **named: looked_at.append(path) or stat(path, *rest, **named))
    pictures = ImageFolders(tmp_path, "data.train.images", "get them")
    assert all(pictures.has(pictures.subfolder(name.parent.name) / name.name) for name in names)
    pictures.refuse_missing()
    assert sorted(listed) == [tmp_path, tmp_path / "a", tmp_path / "b"]
    assert len(looked_at) < 10


def test_the_error_counts_the_missing_and_shows_the_first_few(tmp_path: Path):
    touched(tmp_path / "0.jpg")
    pictures = ImageFolders(tmp_path, "data.eval.images", "get them")
    assert [pictures.has(tmp_path / f"{number}.jpg") for number in (0, 1, 2, 3, 4, 4)] == [True] + [False] * 5
    with pytest.raises(ValueError, match=r"4 of 5 images are not there, the first 1\.jpg, 2\.jpg, 3\.jpg; get them"):
        pictures.refuse_missing()


def test_no_image_asked_for_is_no_image_missing(tmp_path: Path):
    ImageFolders(tmp_path, "data.eval.images", "get them").refuse_missing()
