"""The tool packs folders and tables into shards that a run reads; what no run could read is left out and named."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from crafted_shards import config, encoded_image, opened

from modstruct.data.shards.reader import ShardReader

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Runs the tool; returns its exit status."""

    def run(source: Path, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(source), "--output", str(tmp_path / "shards"), *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code

    return run


def read_all(folder: Path):
    data = config(folder)
    samples = opened(folder / "shards" / "*.tar", data)
    reader = ShardReader(samples, data)
    return samples, [reader.read(number) for number in range(len(samples))]


def test_a_folder_becomes_shards(tmp_path, make, capsys):
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    for number, name in enumerate(["a.b.png", "b.PNG", "deeper/c.jpg"]):
        (source / name).write_bytes(encoded_image(number, kind="JPEG" if name.endswith("jpg") else "PNG"))
        (source / name).with_suffix(".txt").write_text(f"caption {number} ü\n")
    (source / "b.json").write_text('{"label": "x", "captions": ["p", "q"]}')
    (source / "lonely.png").write_bytes(encoded_image())
    (source / "broken.png").write_bytes(b"no image")
    (source / "broken.txt").write_text("words")
    (source / "notes.md").write_text("no image")
    assert make(source, "--samples_per_shard", "2") == 0
    said = capsys.readouterr()
    assert "3 samples in" in said.out
    assert "1 left out: no caption" in said.out
    assert f"undecodable image: {source / 'broken.png'}" in said.err
    assert f"1 passed over: files .md ({source / 'notes.md'})" in said.out
    samples, raws = read_all(tmp_path)
    assert [Path(shard).name for shard in samples.shards] == ["00000.tar", "00001.tar"]
    assert [raw.key for raw in raws] == ["00000000000", "00000000001", "00001000000"]
    assert [raw.caption for raw in raws] == ["caption 0 ü", "caption 1 ü", "caption 2 ü"]
    assert raws[1].captions == ["p", "q"]
    assert raws[1].metadata["label"] == "x"
    assert raws[0].image == encoded_image(0)
    assert not list((tmp_path / "shards").glob("*.part"))


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t")])
def test_a_table_becomes_shards(tmp_path, make, name, separator):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded_image(number))
    rows = [["file", "title", "label"], *([f"{n}.png", f'"a {n}{separator}b"', str(n)] for n in (0, 1, 1, 2))]
    (tmp_path / name).write_text("\n".join(separator.join(row) for row in rows))
    assert make(tmp_path / name, "--image_column", "file", "--caption_column", "title") == 0
    _, raws = read_all(tmp_path)
    assert [raw.caption for raw in raws] == [f"a {n}{separator}b" for n in (0, 1, 1, 2)]
    assert [raw.metadata["label"] for raw in raws] == ["0", "1", "1", "2"]


@pytest.mark.parametrize("caption", ['"oops no end', '"5" nails'])
def test_a_quote_that_nothing_closes_takes_no_other_rows(tmp_path, make, capsys, caption):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded_image(number))
    rows = ["image,caption", "0.png,first", f"1.png,{caption}", "2.png,third"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    assert make(tmp_path / "t.csv") == 2
    assert "t.csv: the row that begins in line 3: " in capsys.readouterr().err
    assert make(tmp_path / "t.csv", "--plain_quotes") == 0
    assert [raw.caption for raw in read_all(tmp_path)[1]] == ["first", caption, "third"]


def test_linked_folders_are_searched_once_and_hidden_ones_passed_over(tmp_path, make, capsys):
    images, real = tmp_path / "images", tmp_path / "real"
    for number, folder in enumerate((images, real, images / ".ipynb_checkpoints")):
        folder.mkdir()
        (folder / f"{number}.png").write_bytes(encoded_image(number))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    (images / "more").symlink_to(real)
    (real / "round").symlink_to(images)
    (images / ".ipynb_checkpoints" / "link").symlink_to(real)
    assert make(images) == 0
    assert [raw.caption for raw in read_all(tmp_path)[1]] == ["caption 0", "caption 1"]
    said = capsys.readouterr().out
    assert "2 passed over: hidden files" in said
    assert "1 passed over: folders that are searched already, through a link" in said


def test_rows_of_one_image_may_be_joined(tmp_path, make):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded_image(number))
    (tmp_path / "t.csv").write_text("image,caption\n0.png,p\n1.png,q\n0.png,r\n")
    make(tmp_path / "t.csv", "--join_captions")
    assert [raw.captions for raw in read_all(tmp_path)[1]] == [["p", "r"], ["q"]]


def test_what_cannot_work_is_said(tmp_path, make, capsys):
    (tmp_path / "t.csv").write_text("image,caption\nmissing.png,p\n")
    assert make(tmp_path / "t.csv", "--image_column", "file") == 2
    assert "--image_column = 'file': the columns of" in capsys.readouterr().err
    assert make(tmp_path / "none.csv") == 2
    (tmp_path / "captions_val2014.json").write_text('{"images": [], "annotations": []}')
    assert make(tmp_path / "captions_val2014.json") == 2
    assert "this is JSON (COCO's captions file" in capsys.readouterr().err
    (tmp_path / "twice.csv").write_text("image,caption,caption\na.png,p,q\n")
    assert make(tmp_path / "twice.csv") == 2
    assert "two columns are called 'caption'" in capsys.readouterr().err
    for content, told in ((b"sep=;\nimage;caption\n", "delete it"), ("image,caption".encode("utf-16"), "as UTF-8")):
        (tmp_path / "other.csv").write_bytes(content)
        assert make(tmp_path / "other.csv") == 2
        assert told in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty") == 2
    assert make(tmp_path / "t.csv") == 1
    said = capsys.readouterr().err
    assert "unreadable file: " in said
    assert "usage:" not in said
    assert not (tmp_path / "shards").exists()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"")
    assert make(tmp_path / "t.csv") == 2
    assert "holds shards already" in capsys.readouterr().err


def test_what_pillow_opens_is_packed_and_every_other_file_is_counted(tmp_path, make, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for number, (name, kind) in enumerate(
        {"a.GIF": "GIF", "b.avif": "AVIF", "c.JPG": "JPEG", "d.jfif": "JPEG"}.items()
    ):
        (source / name).write_bytes(encoded_image(number, kind=kind))
        (source / name).with_suffix(".TXT" if name == "c.JPG" else ".txt").write_text(f"caption {number}")
    (source / "e.jpg").write_bytes(encoded_image(4, kind="BMP"))  # by a wrong name
    (source / "e.txt").write_text("caption 4")
    (source / "a.json").write_text('{"key": "mine", "caption": "of the file"}')
    (source / "lonely.txt").write_text("no image")
    (source / "film.heic").write_bytes(b"x")
    (source / ".DS_Store").write_bytes(b"x")
    assert make(source) == 0
    said = capsys.readouterr().out
    _, raws = read_all(tmp_path)
    assert [raw.caption for raw in raws] == [f"caption {n}" for n in range(5)]
    first_bytes = [raw.image[:4] for raw in raws]
    assert first_bytes == [b"\x89PNG", b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe0", b"\x89PNG"]
    for line in (
        f"1 changed: .gif stored as PNG ({source / 'a.GIF'})",
        f"1 changed: .jpg stored as PNG ({source / 'e.jpg'})",
        f"1 changed: metadata field `key` replaced ({source / 'a.GIF'})",
        f"1 changed: metadata field `caption` replaced ({source / 'a.GIF'})",
        f"1 passed over: files .heic ({source / 'film.heic'})",
        f"1 passed over: hidden files ({source / '.DS_Store'})",
        f"1 passed over: files .txt without an image ({source / 'lonely.txt'})",
    ):
        assert line in said


def test_spreadsheets_that_separate_by_semicolons_are_read_and_other_encodings_named(tmp_path, make, capsys):
    (tmp_path / "0.png").write_bytes(encoded_image(0))
    (tmp_path / "1.png").write_bytes(encoded_image(1))
    (tmp_path / "t.csv").write_bytes("image;caption\n0.png;ein Löwe, müde\n".encode() + b"1.png;ein L\xf6we\n")
    assert make(tmp_path / "t.csv") == 0
    assert "1 left out: a text that is no UTF-8: save the table" in capsys.readouterr().out
    assert [raw.caption for raw in read_all(tmp_path)[1]] == ["ein Löwe, müde"]


def test_a_table_that_would_lose_text_says_so(tmp_path, make, capsys):
    (tmp_path / "0.png").write_bytes(encoded_image(0))
    (tmp_path / "1.png").write_bytes(encoded_image(1))
    (tmp_path / "t.csv").write_text("image,caption\n0.png,a dog, running\n1.png,a cat\n")
    assert make(tmp_path / "t.csv") == 0
    assert "1 left out: a row of more cells than columns" in capsys.readouterr().out
    assert [raw.caption for raw in read_all(tmp_path)[1]] == ["a cat"]
    (tmp_path / "u.csv").write_text("image,caption,caption\n0.png,a,b\n")
    assert make(tmp_path / "u.csv") == 2
    assert "two columns are called 'caption'" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded_image(0))
    (tmp_path / "in" / "a.json").write_text("[]")
    assert make(tmp_path / "in") == 2
    assert "must hold a JSON object, {...}, not a list" in capsys.readouterr().err


def test_any_number_of_processes_writes_the_same_shards_and_a_killed_one_is_resumed(tmp_path, make, capsys):
    source, shards, others = tmp_path / "in", tmp_path / "shards", tmp_path / "others"
    source.mkdir()
    for number in range(11):
        (source / f"{number:02d}.png").write_bytes(b"none" if number == 4 else encoded_image(number))
        (source / f"{number:02d}.txt").write_text(f"caption {number}")
    (source / "notes.md").write_text("none")
    assert make(source, "--samples_per_shard", "3", "--workers", "1") == 0
    command = [sys.executable, TOOL, source, "--output", others, "--samples_per_shard", "3", "--workers", "2"]
    subprocess.run(command, check=True, capture_output=True)
    written = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert written == {path.name: path.read_bytes() for path in others.iterdir()}
    manifest = json.loads(written["manifest.json"])
    assert [shard["samples"] for shard in manifest["shards"]] == [3, 2, 3, 2]
    assert manifest["samples"] == 10
    assert manifest["left_out"]["counts"] == {"undecodable image": 1}
    assert manifest["passed_over"]["examples"] == {"files .md": [str(source / "notes.md")]}
    for shard in manifest["shards"]:
        assert hashlib.sha256(written[shard["shard"]]).hexdigest() == shard["sha256"]
        assert len(written[shard["shard"]]) == shard["bytes"]

    # As it is when the process is killed while it notes that the third shard is whole.
    lines = [json.dumps(shard).encode() + b"\n" for shard in manifest["shards"]]
    (shards / "packing.jsonl").write_bytes(b"".join([*lines[:2], lines[2][:20]]))
    for name in ("manifest.json", "00003.tar"):
        (shards / name).unlink()
    (shards / "00003.tar.part").write_bytes(b"half")
    before = [(shards / f"0000{n}.tar").stat().st_mtime_ns for n in range(3)]
    assert make(source, "--samples_per_shard", "3") == 0
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == written
    after = [(shards / f"0000{n}.tar").stat().st_mtime_ns for n in range(3)]
    assert after[:2] == before[:2]
    assert after[2] > before[2]
    capsys.readouterr()
    assert make(source, "--samples_per_shard", "4") == 2
    assert "00000.tar was packed from other entries: the input or --samples_per_shard" in capsys.readouterr().err
    for number in range(9, 11):
        (source / f"{number:02d}.png").unlink()
    assert make(source, "--samples_per_shard", "3") == 2
    assert "00003.tar was packed from other entries" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == written
