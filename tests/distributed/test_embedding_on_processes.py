"""Embedded sets are the same to the byte on any number of processes, also when another number resumes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numbered_images import CLASS_FILE, open_source, write_source
from numbered_sets import Encode, LabelledNumbers, config, content, numbered_model
from processes import run_on_processes

from modstruct.data.classification.class_files import load_classes
from modstruct.data.classification.labelled_shards import LabelledSamples
from modstruct.distributed import rank
from modstruct.evaluation.embeddings.embed import embed as embed_set
from modstruct.evaluation.embeddings.embed import embed_sets
from modstruct.evaluation.embeddings.source import EmbeddingSource

NUMBERS = [i % 37 for i in range(43)]
BROKEN = (8, 9, 10, 11)


def sources(folder: str) -> list[EmbeddingSource]:
    captioned = EmbeddingSource.of_samples("things", open_source(Path(folder)))
    return [captioned, EmbeddingSource.of_labelled(LabelledNumbers(5))]  # of one part: some processes have none


def embed(folder: str, out: str, stop_after: int | None = None) -> dict:
    """What one process sees; stop_after: batches after which process 1 fails."""
    encode = Encode(stop_after if rank() == 1 else None)
    try:
        sets = embed_sets(numbered_model(encode), [(source, config()) for source in sources(folder)], out)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "calls": len(encode.calls)}
    rows = [embedded.manifest["rows"] for embedded in sets]
    return {"rows": rows, "calls": len(encode.calls), "in memory": in_memory(folder)}


def in_memory(folder: str) -> dict[str, list]:
    """Tables of each set embedded without a folder; numbers that are not there are null."""
    found = {}
    for source in sources(folder):
        made = embed_set(numbered_model(), source, config(dtype="float32"))
        arrays = {"labels": made.labels, "class_prompts": made.class_prompts, "image": made.rows("image")}
        own = {name: None if rows is None else np.nan_to_num(rows, nan=-9.0).tolist() for name, rows in arrays.items()}
        found[source.name] = own | {"keys": made.keys, "captions": made.captions, "pairs": made.pairs.tolist()}
    return found


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_source(folder, NUMBERS, lambda n: [f"thing {n}", f"object {n % 20}"], broken=BROKEN)
    return str(folder)


@pytest.fixture(scope="module")
def alone(shard, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    embed(shard, str(out))
    return out


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_what_one_writes(shard, alone, tmp_path, processes):
    seen = run_on_processes(embed, processes, shard, str(tmp_path))
    for name in ("things", "numbers"):
        assert content(tmp_path / name) == content(alone / name)
    rows = [{"image": 39, "text": 53}, {"image": 5, "text": 0}]
    assert all(result["rows"] == rows for result in seen)
    assert all(result["calls"] > 0 for result in seen)
    alone_in_memory = in_memory(shard)
    for rank_, result in enumerate(seen):
        for name, tables in result["in memory"].items():
            for table, values in alone_in_memory[name].items():
                if rank_ and table in ("class_prompts", "image") and values is not None:
                    assert np.shape(tables[table]) == np.shape(values)
                    assert np.all(np.array(tables[table]) == -9), "embeddings are on the main process alone"
                else:
                    assert tables[table] == values


def test_a_failure_reaches_all_and_another_number_of_processes_goes_on(shard, alone, tmp_path):
    first, second = run_on_processes(embed, 2, shard, str(tmp_path), 5)
    assert second["error"] == "ArithmeticError: stopped in the middle"
    assert first["error"] == "FailedElsewhere: another process failed first: ArithmeticError: stopped in the middle"
    assert list((tmp_path / "things/parts").glob("image-*.npz"))
    embed(shard, str(tmp_path))
    for name in ("things", "numbers"):
        assert content(tmp_path / name) == content(alone / name)


def embed_with_classes(folder: str, out: str) -> int:
    """A set, and then the same samples with classes; returns the batches of images that this process embedded."""
    samples, encode, classes = open_source(Path(folder)), Encode(), load_classes(f"{folder}/classes.yaml")
    labelled = LabelledSamples("parity", samples.samples.shards[0], classes, samples.config)
    sets = [EmbeddingSource.of_samples("plain", samples), EmbeddingSource.of_labelled(labelled)]
    embed_sets(numbered_model(encode), [(source, config()) for source in sets], out)
    return sum("image" in call for call in encode.calls)


def test_other_classes_of_the_same_samples_are_a_set_of_the_same_rows_on_two_processes(tmp_path):
    folder = tmp_path / "source"
    write_source(folder, NUMBERS, lambda n: [f"thing {n}"])
    (folder / "classes.yaml").write_text(CLASS_FILE)
    assert embed_with_classes(str(folder), str(tmp_path / "alone")) == 22  # eleven batches, plain and augmented
    assert sum(run_on_processes(embed_with_classes, 2, str(folder), str(tmp_path / "two"))) <= 24
    for name in ("plain", "parity"):
        assert content(tmp_path / "two" / name) == content(tmp_path / "alone" / name)
