"""A filter keeps the samples of which img2dataset's parquet says so; what it left out is counted and named."""

from __future__ import annotations

import logging
import operator
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from crafted_shards import config, opened, sample, write_tar
from pyarrow import parquet

from modstruct.config import Source
from modstruct.data.run_data import train_sources
from modstruct.data.shards import parquet as parquet_module
from modstruct.data.shards.index import ShardIndex, index_shards
from modstruct.data.shards.parquet import parsed
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples

COLUMNS = {
    "similarity": [0.1, 0.5, None, 0.4, 0.9, 0.8, float("nan")],
    "width": [64, 256, 256, 128, 127, 512, 100],
    "license": ["by", "by", "no", "no", None, "by", None],
    "status": [*["success"] * 5, "failed_to_download", "success"],
}


@pytest.fixture
def shards(tmp_path) -> Path:
    """Of seven rows, one failed, one success that the tar lacks, in another order; and a sample without a row."""
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [m for n in (0, 1, 2, 3, 6, 9) for m in sample(10 * shard + n)])
        table = pa.table({"key": [f"{10 * shard + n:06d}" for n in range(7)], **COLUMNS})
        parquet.write_table(table.take([3, 5, 1, 0, 6, 4, 2]), tmp_path / f"{shard}.parquet")
    return tmp_path


def kept(shards: Path, text: str, **fields):
    data = config(shards, train=str(shards / "*.tar"), filter=text, **fields)
    samples = open_samples(train_sources(data), data, "data.train", progress=True)
    reader = ShardReader(samples, data)
    return samples, [reader.read(number).metadata["number"] for number in range(len(samples))]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("similarity > 0.3 and width >= 128", [1, 3]),
        ("not similarity > 0.3", [0]),
        ("0.3 < similarity < 0.45 or width == 64", [0, 3]),
        ("license in ['no', 'x'] and width != 256", [3]),
        ("license not in ['no']", [0, 1]),  # nor those without a value, as of any comparison
        ("not license in ['no']", [0, 1]),
        ("not (similarity < 0.3)", [1, 3]),
        ("similarity != 0.5", [0, 3]),
        ("width > -1", [0, 1, 2, 3, 6]),
    ],
)
def test_samples_are_kept_by_their_columns(shards, text, numbers):
    samples, found = kept(shards, text)
    assert found == numbers + [10 + n for n in numbers]
    assert samples.filters[0]["kept"] == len(found)


def test_what_a_filter_does_is_told_and_it_is_part_of_what_tells_samples_apart(shards, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", True)
    pattern = str(shards / "*.tar")
    before = opened(pattern, config(shards))
    for _ in range(2):  # made, and found again
        caplog.clear()
        samples, _ = kept(shards, "similarity > 0.3")
        assert caplog.messages == [
            f"data.filter, {pattern}: 4 of 12 samples are kept (33.3%; 4 left out for want of a value; 2 left out for "
            "want of a row; 2 rows without a sample)"
        ]
    assert len({before.fingerprint, samples.fingerprint, kept(shards, "similarity > 0.45")[0].fingerprint}) == 3
    data = config(shards, filter="width > 200")
    data.train = [Source(pattern), Source(pattern, filter=""), Source(pattern, filter="width < 100")]
    several = open_samples(train_sources(data), data, "data.train", progress=True)
    assert [int(sizes.sum()) for sizes in several.shard_sizes()] == [4, 12, 2]
    assert "data.filter: 18 samples of all sources are kept" in caplog.messages


def test_what_cannot_be_filtered_is_refused_by_name(shards, monkeypatch):
    for text, message in {
        "similarity > 0.3 and heigth > 3": r"0\.parquet has no column heigth; its columns are key, similarity, width",
        "width > ": "is no expression",
        "__import__('os').system('x') > 3": r"\"__import__\('os'\)\.system\('x'\)\" is not understood",
        "width.real > 3": "'width.real' is not understood",
        "width > 3 if width else 2": "is not understood",
        "width": "is of type int64, no condition",
        "width > 'a'": r"cannot be computed of these columns \(width: int64\)",
        "width > 10_000": "keeps none of the 12 samples",
        "similarity > 100000000000000000000000": "a whole number beyond 64 bits: write it with a point",
        "license in ['by', 1]": "has values that are no column's",
        "-" * 300 + "width > 3": "is not understood",
        "(" * 300 + "width > 3": "is no expression",
    }.items():
        with pytest.raises(ValueError, match=f"^data.filter = .*{message}"):
            kept(shards, text)
    (shards / "1.parquet").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"^data\.train = '.*/1\.parquet': could not be read"):
        kept(shards, "width > 4")
    (shards / "1.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards of .* have no parquet beside them .* \(first .*1\.parquet\)"):
        kept(shards, "width > 3")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'modstruct\[parquet\]'"):
        parsed("width > 3")


def test_keys_that_an_earlier_index_lacks_are_read_again(shards, monkeypatch):
    monkeypatch.setattr("modstruct.data.shards.index.parquet_name", lambda shard: "nowhere")
    opened(shards / "*.tar", config(shards))
    files = [*(shards / "cache" / "indexes").glob("*.npz")]
    assert [ShardIndex.load(file).keys for file in files] == [None, None]
    assert kept(shards, "width == 64")[1] == [0, 10]
    assert all(len(ShardIndex.load(file).keys) == 6 for file in files)


def test_any_expression_of_the_grammar_is_what_numpy_has(shards):
    generator = np.random.default_rng(0)
    values = {name: generator.integers(0, 5, 200) for name in ("a", "b")}
    keys = [f"{n:06d}" for n in range(200)]
    write_tar(shards / "big.tar", [m for n in range(200) for m in sample(n)])
    parquet.write_table(pa.table({"key": keys, **values}), shards / "big.parquet")
    index_shards([(str(shards / "big.tar"), shards / "big.npz")], progress=False)
    comparisons = {"<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne}
    for _ in range(20):
        (one, of_one), (other, of_other) = ([*comparisons.items()][n] for n in generator.integers(0, 4, 2))
        text = f"a {one} b and not 2 {other} a or b > 3"
        mask, effect = parquet_module.filtered((text, str(shards / "big.tar"), shards / "big.npz"))
        a, b = values["a"], values["b"]
        np.testing.assert_array_equal(mask, (of_one(a, b) & ~of_other(2, a)) | (b > 3))
        assert effect == replace(effect, samples=200, kept=int(mask.sum()), without_row=0, without_sample=0)


def test_a_parquet_beside_an_object_serves_as_well(shards):
    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        if file.suffix in (".tar", ".parquet"):
            memory.pipe_file(f"/filtered/{file.name}", file.read_bytes())
    data = config(shards, train="memory://filtered/{0,1}.tar", filter="width == 64")
    samples = open_samples(train_sources(data), data, "data.train")
    assert [ShardReader(samples, data).read(n).metadata["number"] for n in range(len(samples))] == [0, 10]
    memory.rm_file("/filtered/1.parquet")
    data.filter = "width < 64"
    with pytest.raises(ValueError, match=r"1 of 2 shards of memory.* \(first memory://filtered/1\.parquet\)"):
        open_samples(train_sources(data), data, "data.train")
