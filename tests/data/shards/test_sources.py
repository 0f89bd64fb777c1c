"""Patterns name exactly the shards that are there; what cannot work is refused by field, value and remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from braceexpand import braceexpand

from modstruct.config import DataConfig, Source
from modstruct.data.shards.sources import as_sources, expand_pattern, expand_sources


@pytest.fixture
def folder(tmp_path):
    for name in ("b-1.tar", "a-0.tar", "a-1.tar", "a-10.tar", "odd{name}[1].tar"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a-deeper").mkdir()
    return tmp_path


def names(shards):
    return [os.path.basename(shard) for shard in shards]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-0.tar", ["a-0.tar"]),
        ("a-{0..1}.tar", ["a-0.tar", "a-1.tar"]),
        ("a-?.tar", ["a-0.tar", "a-1.tar"]),
        ("{b,a}-*.tar", ["b-1.tar", "a-0.tar", "a-1.tar", "a-10.tar"]),
        ("odd{name}[1].tar", ["odd{name}[1].tar"]),
    ],
)
def test_patterns_expand_in_the_order_written(folder, pattern, expected):
    shards = expand_pattern(str(folder / pattern), False, "data.train")
    assert names(shards) == expected
    assert all(os.path.isabs(shard) for shard in shards)


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("none-*.tar", "no file matches in .*correct the pattern"),
        ("a-{0..3}.tar", r"2 of 4 files do not exist, the first is .*a-2\.tar"),
        ("a-deeper", r"is a folder; name its shards, as in '.*\*\.tar'"),
        ("a-{0..1.tar", "close the braces"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(folder, pattern, remedy):
    with pytest.raises(ValueError, match=rf"^data\.validation = '.*': .*{remedy}"):
        expand_pattern(str(folder / pattern), False, "data.validation")


def test_something_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="not an ordinary file; use pipe:"):
        expand_pattern(str(tmp_path / "x.tar"), False, "data.train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(folder):
    (folder / "a-0.tar").chmod(0)
    with pytest.raises(ValueError, match="may not be read"):
        expand_pattern(str(folder / "a-0.tar"), False, "data.train")


def test_a_pipe_needs_permission():
    with pytest.raises(ValueError, match=r"data.eval = 'pipe:cat x': .*data.allow_pipe: true"):
        expand_pattern("pipe:cat x", False, "data.eval")
    assert expand_pattern("pipe:get {00..02}.tar | cat ${X}", True, "data.eval") == [
        f"pipe:get 0{i}.tar | cat ${{X}}" for i in range(3)
    ]


def test_all_forms_of_the_field_become_sources(folder):
    assert as_sources("x") == as_sources(["x"]) == as_sources([Source("x")]) == [Source("x")]
    pattern = str(folder / "a-0.tar")
    (expanded,) = expand_sources([Source(pattern, weight=2.0)], DataConfig(), "data.train")
    assert (names(expanded.shards), expanded.pattern) == (["a-0.tar"], pattern)


def test_weights_are_given_to_all_sources_or_to_none(folder):
    sources = [Source(str(folder / "a-0.tar"), weight=weight) for weight in (1.0, None)]
    with pytest.raises(ValueError, match=r"^data\.train\.weight = .*every source a weight, or none"):
        expand_sources(sources, DataConfig(), "data.train")
    for weight in (float("inf"), -1.0, 0.0, [0.0, 0.0], []):
        with pytest.raises(
            ValueError, match=r"^data\.train\.weight = .*a finite number above 0, or a list of which one"
        ):
            Source("a", weight=weight)
    with pytest.raises(ValueError, match=r"^data\.train\.max_repeats = 2: give the sources weights, too"):
        Source("a", max_repeats=2)
    for names_given in (["web", "web"], ["source_1", None]):
        twice = [Source(str(folder / "a-0.tar"), name=name) for name in names_given]
        with pytest.raises(ValueError, match=r"^data\.train\.name = .*a name of its own"):
            expand_sources(twice, DataConfig(), "data.train")


def test_a_missing_index_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"^data\.train\.index = '/nowhere': .*tools/index_shards.py"):
        expand_sources([Source(str(folder / "a-0.tar"), index="/nowhere")], DataConfig(), "data.train")


@pytest.mark.parametrize("pattern", ["{0..10}", "{00..10}", "{000..7}", "{5..5}", "{10..009}", "{08..9}", "{3..1}"])
def test_ranges_expand_as_webdataset_has_them(tmp_path, pattern):
    names = list(braceexpand(f"x-{pattern}.tar"))
    for name in names:
        (tmp_path / name).touch()
    found = expand_pattern(str(tmp_path / "." / f"x-{pattern}.tar"), False, "data.train")
    assert found == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("folder", ["", "here/", "./here/", "here/../", "here//", "here/.hidden/"])
def test_shards_get_absolute_paths(tmp_path, monkeypatch, folder):
    (tmp_path / "here" / ".hidden").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = [f"{folder}{number}.tar" for number in range(3)]
    for name in names:
        Path(name).touch()
    assert expand_pattern(f"{folder}{{0..2}}.tar", False, "data.train") == [os.path.abspath(name) for name in names]
