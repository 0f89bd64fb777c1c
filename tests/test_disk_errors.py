"""Errors of the disk: the field that chose the place, the path, how full it is or whose it is, in one line."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from crafted_shards import encoded_image, sample, write_tar

from modstruct import checkpoints, cli
from modstruct.config import DataConfig, Recipe
from modstruct.data.run_data import open_run_data
from modstruct.files import atomic_write, disk_error, naming, refusing, require_writable


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_by_path_and_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "metrics.json") as file:  # noqa: PT011
        file.write(b"x")
    told = rf"No space left on device \([\d.,]+ of [\d,]+ MiB are free there\): {tmp_path}/metrics\.json"
    assert re.fullmatch(told, disk_error(raised.value))
    assert not list(tmp_path.iterdir())


def test_tensors_on_a_full_disk_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device \(.* MiB are free there\): '.*/weights"):
        checkpoints.save_tensors({"x": torch.zeros(4)}, tmp_path / "weights.safetensors")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_a_folder_is_refused_by_its_field(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"^--out = '.*{place}': .*/file is a file, where a folder is needed\); make"):
        require_writable("--out", tmp_path / place)


def test_a_folder_of_another_user_is_refused_with_both_names(tmp_path, monkeypatch):
    """As root no folder refuses, so the system's answer is played."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "below"))

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    owner = tmp_path.owner()
    with pytest.raises(
        ValueError,
        match=rf"^data\.cache = .*Permission denied: .*/below \(.* belongs to {owner}, this process to user 4000000\)",
    ):
        require_writable("data.cache", tmp_path / "below")


def test_an_error_elsewhere_is_not_blamed_on_a_field(tmp_path):
    with pytest.raises(FileNotFoundError), refusing("data.cache", tmp_path / "cache"), naming(tmp_path / "cache"):
        (tmp_path / "shards.tar").read_bytes()


def test_a_relative_folder_is_blamed_for_its_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^data\.cache = 'cache': No such file"), refusing("data.cache", "cache"):
        (tmp_path / "cache" / "x").read_bytes()


def test_what_a_run_cannot_keep_is_refused_by_data_cache(tmp_path):
    """Indexes of the shards of others, not the built-in data alone."""
    (tmp_path / "file").write_text("")
    (tmp_path / "x.tar").write_bytes(b"")
    data = DataConfig(
        train=str(tmp_path / "x.tar"), validation=None, eval=None, zero_shot=None, cache=str(tmp_path / "file/cache")
    )
    with pytest.raises(ValueError, match=r"^data\.cache = '.*file/cache': .*make room, or name a folder"):
        open_run_data(Recipe(data=data), 32)


def test_a_command_says_an_error_of_the_disk_in_one_line(capfd, tmp_path):
    with pytest.raises(SystemExit), naming(tmp_path):
        cli.run(lambda: (tmp_path / "a" / "b").write_text("x"))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert said == [f"error (process 0): No such file or directory: {tmp_path}/a/b"]


def test_without_a_home_the_field_that_needs_one_is_named(capfd, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)

    def no_home(_: str) -> str:
        return "~"  # what os.path makes of it for a user whom the system does not know

    monkeypatch.setattr(os.path, "expanduser", no_home)
    with pytest.raises(SystemExit):
        cli.run(lambda: Path("~/.cache/modstruct").expanduser())
    assert "error (process 0): HOME = None: this user has no home directory: set it, or give data.cache" in (
        capfd.readouterr().err
    )


def test_without_a_folder_for_temporary_files_the_variable_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(FileNotFoundError) as raised:
        tempfile._get_default_tempdir()
    assert disk_error(raised.value).startswith("TMPDIR: No usable temporary directory found in ['/nowhere']: set it")


@pytest.mark.parametrize(
    "words", [["make_shards", "--output"], ["index_shards", "--output"], ["index_shards", "--cache"]]
)
def test_tools_refuse_a_place_that_cannot_be_written_by_its_option(tmp_path, words):
    tool, option = words
    (tmp_path / "file").write_text("")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded_image())
    (tmp_path / "images" / "a.txt").write_text("a caption")
    write_tar(tmp_path / "x.tar", sample(0))
    source = tmp_path / ("images" if tool == "make_shards" else "x.tar")
    script = Path(__file__).parents[1] / "tools" / f"{tool}.py"
    command = [sys.executable, script, source, option, tmp_path / "file" / "below"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    told = done.stderr.splitlines()[-1]
    assert f"{option} = '{tmp_path}/file/below" in told
    assert "is a file, where a folder is needed" in told
