"""Published JSON and image folders: bounded, and only ValueError for what is not as published."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_samples import KARPATHY_COCO, NLVR2_DEV, SNLI_VE, VQA_ANNOTATIONS, VQA_QUESTIONS, as_json, touched

from modstruct.data.downstream import published_files
from modstruct.data.downstream.karpathy import read_karpathy
from modstruct.data.downstream.nlvr2 import read_nlvr2
from modstruct.data.downstream.published_files import ImageFolders, published_file, read_json, read_json_lines
from modstruct.data.downstream.snli_ve import read_snli_ve
from modstruct.data.downstream.vqa import read_answer_list, read_vqa


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 10_000, b'{"a": 1}{"b": 2}'],
    ids=["empty", "cut off", "not UTF-8", "too deep", "a long number", "two values"],
)
def test_what_is_not_json_is_refused_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json: not JSON in UTF-8 .*download the file again"):
        read_json(path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]


def test_keys_that_nobody_asked_for_are_not_kept(tmp_path: Path):
    content = {"a": [{"a": 1, "b": 2}], "b": {"a": 3}}
    assert read_json(as_json(tmp_path / "file.json", content), keys=("a",)) == {"a": [{"a": 1}]}


def test_files_and_lines_beyond_all_published_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.jsonl"
    path.write_text('{"a": 1}\n\n' + '{"a": "' + "x" * published_files.LARGEST_LINE_BYTES + '"}\n')
    with pytest.raises(ValueError, match=r"file\.jsonl, line 3: a line of at most 1 MiB"):
        list(read_json_lines(path))
    monkeypatch.setattr(published_files, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"data\.train\.x = '.*file\.jsonl': larger than"):
        published_file(path, "data.train.x", "get it")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def spoilt(draw, content: object) -> object:
    """The content with one value replaced, wherever."""
    content = json.loads(json.dumps(content))
    place = draw(st.sampled_from(places(content)[1:]))
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = draw(json_values)
    return content


ALBEF_LIST = [
    {
        "image": "val2014/1.jpg",
        "caption": ["a", "b"],
        "sentence": "c",
        "label": label,
        "question_id": 3,
        "question": "d",
    }
    | {"images": ["dev/dev-1-0-img0.png", "dev/dev-1-0-img1.png"], "answer": ["e"], "dataset": "vqa"}
    for label in ("True", "neutral")
]
READERS = {
    "questions": (VQA_QUESTIONS, lambda path, folder: read_vqa(path, folder)),
    "annotations": (
        VQA_ANNOTATIONS,
        lambda path, folder: read_vqa(as_json(folder / "questions.json", VQA_QUESTIONS), folder, path),
    ),
    "karpathy": (KARPATHY_COCO, lambda path, folder: read_karpathy(path, folder, "train")),
    "answers": (["a", "b"], lambda path, folder: read_answer_list(path)),
    "nlvr2": (NLVR2_DEV, lambda path, folder: read_nlvr2(path, folder)),
    "snli_ve": (SNLI_VE, lambda path, folder: read_snli_ve(path, folder)),
    "albef questions": (ALBEF_LIST, lambda path, folder: read_vqa(path, folder)),
    "albef captions": (ALBEF_LIST, lambda path, folder: read_karpathy(path, folder, "train")),
    "albef statements": (ALBEF_LIST, lambda path, folder: read_nlvr2(path, folder)),
    "albef hypotheses": (ALBEF_LIST, lambda path, folder: read_snli_ve(path, folder)),
}


@pytest.mark.parametrize("reader", READERS)
@given(data=st.data())
def test_a_spoilt_file_gives_value_error_or_is_read(reader: str, data, tmp_path_factory: pytest.TempPathFactory):
    content, read = READERS[reader]
    folder = tmp_path_factory.mktemp("spoilt")
    content = data.draw(spoilt(content))
    path = folder / "file.json"
    if reader in ("nlvr2", "snli_ve"):
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    else:
        as_json(path, content)
    with suppress(ValueError):  # without images every reader ends in one, if not before
        read(path, folder)


def test_each_folder_is_listed_once_however_many_images_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [tmp_path / folder / f"{number}.jpg" for folder in ("a", "b") for number in range(50)]
    touched(*names)
    listed, looked_at = [], []
    listdir, stat = os.listdir, os.stat
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(Path(path)) or listdir(path))
    monkeypatch.setattr(os, "stat", lambda path, *rest, **named: looked_at.append(path) or stat(path, *rest, **named))
    folders = ImageFolders(tmp_path, "data.train.images", "get them")
    assert all(folders.has(folders.subfolder(name.parent.name) / name.name) for name in names)
    folders.refuse_missing()
    assert sorted(listed) == [tmp_path, tmp_path / "a", tmp_path / "b"]
    assert len(looked_at) < 10


def test_the_error_counts_the_missing_and_shows_the_first_few(tmp_path: Path):
    touched(tmp_path / "0.jpg")
    folders = ImageFolders(tmp_path, "data.eval.images", "get them")
    assert [folders.has(tmp_path / f"{number}.jpg") for number in (0, 1, 2, 3, 4, 4)] == [True] + [False] * 5
    with pytest.raises(ValueError, match=r"4 of 5 images are not there, the first 1\.jpg, 2\.jpg, 3\.jpg; get them"):
        folders.refuse_missing()


def test_no_image_looked_up_is_no_image_missing(tmp_path: Path):
    ImageFolders(tmp_path, "data.eval.images", "get them").refuse_missing()
