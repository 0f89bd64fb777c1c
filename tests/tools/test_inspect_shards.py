"""The tool counts what shards hold, finds duplicates, names what no run could use, and shows pairs on a page."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from crafted_shards import config, encoded_image, opened, sample, write_tar
from pyarrow import parquet

from modstruct.data.shards import inspection
from modstruct.data.shards.reader import ShardReader

TOOL = Path(__file__).parents[2] / "tools" / "inspect_shards.py"


@pytest.fixture
def shards(tmp_path) -> str:
    small = [member for n in range(8) for member in sample(n, txt=b"the same" if n < 3 else b"thing <b> %d" % n)]
    copies = [member for n in (8, 9) for member in sample(n, png=encoded_image(5))]
    others = sample(10, png=encoded_image(10, side=40)) + sample(11, png=b"none") + sample(12, txt=None)
    write_tar(tmp_path / "a.tar", small)
    write_tar(tmp_path / "b.tar", copies + others)
    parquet.write_table(pa.table({"status": ["success"] * 2 + ["failed_to_resize"]}), tmp_path / "b.parquet")
    return str(tmp_path / "*.tar")


def test_the_tool_prints_and_writes_a_page(tmp_path, shards, monkeypatch, capsys):
    words = [
        str(TOOL),
        shards,
        "--out",
        str(tmp_path / "seen"),
        "--cache",
        str(tmp_path / "cache"),
        "--workers",
        "1",
        "--near",
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "11 samples in 2 shards" in said
    assert re.search(r"image width +12 +12 .* 40\n", said)
    assert "2 samples of the same bytes as an earlier one (1 groups)" in said
    assert "2 samples of the same caption as an earlier one (1 groups)" in said
    assert re.search(r"1 samples left out: no caption \(first .*b.tar: 000012\)", said)
    assert re.search(r"1 samples left out: undecodable image \(first .*b.tar: 000011.png", said)
    assert "3 rows in the parquets: 2 success, 1 failed_to_resize" in said
    found = json.loads((tmp_path / "seen.json").read_text())
    assert found["repeated"]["image"]["largest"] == [[3, [5, 8, 9]]]
    assert found["left_out"] == {"no caption": 1, "undecodable image": 1}
    assert found["downloads"] == {"success": 2, "failed_to_resize": 1}
    assert found["percentiles"]["caption characters"]["100"] == len("thing <b> 3")
    assert found["repeated"]["near"]["samples"] == 10  # each of one colour that differs little from the next one's
    page = (tmp_path / "seen.html").read_text()
    assert "thing &lt;b&gt; 7" in page
    assert page.count("data:image/jpeg;base64") == 11 + 3 + 3 + 10 * 2


def test_what_does_not_fit_into_memory_is_compared_in_parts(tmp_path, shards, monkeypatch):
    data = config(tmp_path)
    reader = ShardReader(opened(shards, data), data)
    whole = inspection.inspect(reader, data.max_image_pixels, workers=1)
    monkeypatch.setattr(inspection, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(inspection, "SAMPLES_AT_ONCE", 2)
    parts = inspection.inspect(reader, data.max_image_pixels, workers=1)
    assert parts.repeated == whole.repeated
    assert parts.numbers == whole.numbers
    assert [inspection._three_digits(n) for n in (0, 999, 1000, 12_345)] == [0, 999, 1000, 12_300]
    parts.numbers["image bytes"] = inspection.Counter(np.arange(1, 101).tolist())
    assert parts.percentiles("image bytes") == [1, 1, 5, 25, 50, 75, 95, 99, 100]
