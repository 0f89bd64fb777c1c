"""Images of equal bytes are one image with the captions of all: a perfect model finds everything, on any path."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numbered_images import CLASS_FILE, LastNumberTokenizer, LookUp, open_source, views, write_source
from numbered_sets import Encode, config, content, numbered_model
from processes import run_on_processes

from modstruct.config import EvaluationConfig
from modstruct.data.classification.class_files import load_classes
from modstruct.data.run_data import EvaluationData
from modstruct.evaluation.classification import linear_probe, zero_shot
from modstruct.evaluation.classification.linear_probe import LinearProbeConfig
from modstruct.evaluation.embeddings import source as source_module
from modstruct.evaluation.embeddings.derived import without
from modstruct.evaluation.embeddings.embed import embed
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.examples import write_retrieved_examples
from modstruct.evaluation.retrieval import measure as measure_module
from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import DIRECTIONS, RetrievalConfig
from modstruct.evaluation.retrieval.metrics import ranked_queries
from modstruct.evaluation.statistics import wilson
from modstruct.evaluation.structure.measure import measure as measure_structure

IMAGES, COPIES = 12, 5
NUMBERS = [number for number in range(IMAGES) for _ in range(COPIES)]


@pytest.fixture(autouse=True)
def said_anew():
    """What is said once in a process is said once in a test."""
    source_module.say_merged.cache_clear()
    measure_module._said_ties.clear()


def one_caption_a_sample():
    """Captions as img2dataset writes COCO's: a sample a caption, the image copied."""
    place = itertools.count()
    return lambda number: [f"caption {next(place)} of {number}"]


def copies(folder, **more):
    return write_source(folder, NUMBERS, one_caption_a_sample(), **more)


def perfect() -> Encode:
    encode = Encode()
    encode.table = LookUp()
    return encode


def recall_at_1(retrieval: dict) -> list[float]:
    return [retrieval["values"][f"{direction}/recall_at_1"]["value"] for direction in DIRECTIONS]


def recall_of_set(embedded: EmbeddedSet) -> list[float]:
    found = measure_module.measure(embedded, RetrievalConfig(resamples=100))
    return [found.values[f"{direction}/recall_at_1"].value for direction in DIRECTIONS]


def measured(samples, zero_shot=None, encode=None) -> dict:
    data = EvaluationData(views(), LastNumberTokenizer(), samples, zero_shot)
    settings = EvaluationConfig(batch=4, recall_at=[5], top_k=[1])
    results = evaluate(encode or LookUp(), samples, data, settings)
    return {metric: replace(result, seconds=None).to_json() for metric, result in results.items()}


def test_a_perfect_model_finds_everything_during_training(tmp_path, caplog):
    samples = copies(tmp_path)
    (tmp_path / "classes.yaml").write_text(CLASS_FILE)
    metrics = measured(samples, tmp_path / "classes.yaml")
    assert recall_at_1(metrics["retrieval"]) == [1, 1]
    assert metrics["retrieval"]["values"]["text_to_image/recall_at_1"]["chance"] == pytest.approx(1 / IMAGES)
    assert metrics["retrieval"]["rows"].items() >= {"samples": 60, "image": 12, "text": 60, "pairs": 60}.items()
    assert metrics["zero_shot"]["rows"] == {"image": 60, "labelled": 60, "classes": 2}  # labels count samples
    assert "data.eval: 60 samples hold 12 distinct images: byte-equal images are merged" in caplog.text
    assert measured(samples, tmp_path / "classes.yaml") == metrics
    assert len(caplog.records) == 1, "said once"


def test_metrics_are_those_of_one_sample_an_image_with_all_captions(tmp_path):
    captions = [[f"caption {COPIES * n + i} of {n}" for i in range(COPIES)] for n in range(IMAGES)]
    merged = measured(
        write_source(tmp_path / "merged", list(range(IMAGES)), lambda n: captions[n]), encode=LookUp(noise=2)
    )
    copied = measured(copies(tmp_path / "copied"), encode=LookUp(noise=2))
    assert merged["retrieval"]["rows"] | {"samples": 60} == copied["retrieval"].pop("rows")
    del merged["retrieval"]["rows"], merged["retrieval"]["fingerprint"], copied["retrieval"]["fingerprint"]
    del merged["structure"]["fingerprint"], copied["structure"]["fingerprint"]
    assert 0 < recall_at_1(merged["retrieval"])[0] < 1
    for part in ("retrieval", "structure"):
        assert merged[part] == copied[part]


def test_the_same_pixels_in_other_bytes_are_named_by_their_exact_ties(tmp_path, caplog):
    numbers = [*range(20), *range(10)]
    metrics = measured(write_source(tmp_path, numbers, one_caption_a_sample(), stored_otherwise=range(20, 30)))
    assert metrics["retrieval"]["rows"]["image"] == 30
    assert "set eval, text to image: the best positive of 20 of 30 queries ties exactly" in caplog.text
    assert "set eval, image to text: the best positive of 20 of 30 queries ties exactly" in caplog.text
    caplog.clear()
    write_source(tmp_path / "sound", list(range(20)))
    measured(open_source(tmp_path / "sound"))
    assert caplog.text == ""


def test_ties_are_counted_apart_from_items_above():
    random = np.random.default_rng(0)
    gallery = random.integers(-3, 4, (40, 4)).astype(np.float32)
    queries = random.integers(-3, 4, (15, 4)).astype(np.float32)
    pairs = np.unique(np.stack([random.integers(0, 15, 45), random.integers(0, 40, 45)], axis=1), axis=0)
    found, ahead, tied = pairs_ahead(queries, gallery, pairs)
    scores = queries @ gallery.T
    positive = np.zeros(scores.shape, dtype=bool)
    positive[pairs[:, 0], pairs[:, 1]] = True
    own = scores[found[:, 0], found[:, 1]][:, None]
    others, theirs = ~positive[found[:, 0]], scores[found[:, 0]]
    np.testing.assert_array_equal(ahead, ((theirs >= own) & others).sum(1))
    np.testing.assert_array_equal(tied, ((theirs == own) & others).sum(1))
    ranked = ranked_queries(found, ahead, tied, len(gallery))
    best = np.where(positive, scores, -np.inf).max(1, keepdims=True)
    np.testing.assert_array_equal(ranked.tied, ((scores == best) & ~positive).sum(1)[ranked.query])
    assert 0 < np.count_nonzero(ranked.tied) < len(ranked.tied)


@pytest.fixture
def labelled(tmp_path):
    (tmp_path / "classes.yaml").write_text(CLASS_FILE)
    return EmbeddingSource.of_samples("things", copies(tmp_path / "source"), load_classes(tmp_path / "classes.yaml"))


def test_an_embedded_set_keeps_all_samples_and_measures_distinct_images(tmp_path, labelled, caplog):
    embedded = embed(numbered_model(perfect()), labelled, config(), tmp_path / "set")
    assert "set things: 60 samples hold 12 distinct images" in caplog.text
    assert embedded.manifest["rows"] == {"image": 60, "text": 60}
    firsts = [f"{COPIES * number:05d}" for number in range(IMAGES)]
    assert embedded.keys == firsts + [key for key in (f"{place:05d}" for place in range(60)) if key not in firsts]
    numbers = [int(key) // COPIES for key in embedded.keys]
    np.testing.assert_array_equal(embedded.rows("image"), LookUp().image_table[numbers].half())
    assert embedded.labels.tolist() == [number % 2 for number in numbers]
    assert embedded.copies.tolist() == numbers[IMAGES:]
    assert embedded.distinct_pairs.tolist() == [[number, text] for text, number in enumerate(NUMBERS)]
    for kind in ("exact", "hnsw"):
        result = measure_module.measure(embedded, RetrievalConfig(engine=kind, resamples=100))
        assert [result.values[f"{direction}/recall_at_1"].value for direction in DIRECTIONS] == [1, 1], kind
        assert result.rows | {"samples": 60, "image": 12, "text": 60, "pairs": 60} == result.rows
        assert not any("tied" in name for name in result.values)
    images = [labelled.samples[int(row)].image for row in embedded.indices]
    write_retrieved_examples(embedded, dict(result.outcomes), images.__getitem__, tmp_path / "examples")
    shown = json.loads((tmp_path / "examples" / "examples.json").read_text())["examples"]
    assert all(example["results"][0]["right"] for example in shown)
    assert all(len({item["key"] for item in example["results"]}) == 5 for example in shown)
    structure = measure_structure(embedded)
    assert structure.rows == {"image": 12, "text": 60, "pairs": 60}


def test_copies_are_no_independent_evidence_of_an_accuracy(tmp_path, labelled):
    embedded = embed(numbered_model(perfect()), labelled, config(), tmp_path / "set")
    embedded.splits = {"train": embedded}
    probed = linear_probe.measure(embedded, LinearProbeConfig(features="image", strength=100.0))
    for result, name in ((zero_shot.measure(embedded), "ensemble/top_1"), (probed, "top_1")):
        metric = result.values[name]
        assert 0 < metric.value < 1
        assert result.outcomes["group"].tolist() == [int(key) // COPIES for key in embedded.keys]
        low, high = wilson(metric.value, IMAGES)
        assert metric.high - metric.low > 0.8 * (high - low)


def test_a_copy_leaves_with_its_image(tmp_path, labelled):
    embedded = embed(numbered_model(perfect()), labelled, config(), tmp_path / "set")
    rest = without(embedded, ["00007", "00050"], tmp_path / "rest")  # a copy of image 1, and image 10 itself
    assert {int(key) // COPIES for key in rest.keys} == set(range(IMAGES)) - {1, 10}
    assert rest.manifest["rows"] == {"image": 50, "text": 50}
    assert len(rest.copies) == 40
    assert recall_of_set(rest) == [1, 1]


@pytest.fixture
def earlier(monkeypatch):
    """While it lasts, images are embedded as by earlier versions, which took no digest of them."""
    with monkeypatch.context() as context:
        context.setattr("modstruct.data.shards.evaluation_samples.digest_of", lambda content: b"")
        yield context


def test_sets_of_earlier_versions_open_as_they_are(tmp_path, labelled, caplog, earlier):
    folder = tmp_path / "set"
    embed(numbered_model(perfect()), labelled, config(), folder)
    earlier.undo()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    caplog.clear()
    older = embed(numbered_model(perfect()), labelled, config(), folder)
    assert (older.manifest["format"], older.keys) == (1, [f"{place:05d}" for place in range(60)])
    assert "equal images are not merged; --embedding.overwrite true" in caplog.text
    assert recall_of_set(older) == [0, 0]
    assert "(embedded by an earlier version, which merged no equal images), text to image" in caplog.text


@pytest.mark.parametrize("damage", [30, -1, 0.5])
def test_damaged_copies_are_refused_by_name(tmp_path, labelled, damage):
    embed(numbered_model(perfect()), labelled, config(), tmp_path / "set")
    np.save(tmp_path / "set" / "copies.npy", np.full(48, damage))
    with pytest.raises(ValueError, match=r"copies\.npy': is damaged"):
        EmbeddedSet.open(tmp_path / "set").check()


def on_this_process(folder: str, out: str) -> dict:
    source = EmbeddingSource.of_samples("things", open_source(Path(folder)))
    embedded = embed(numbered_model(perfect()), source, config(), Path(out))
    return {"during training": measured(open_source(Path(folder))), "of the set": recall_of_set(embedded)}


def test_two_processes_merge_what_one_does(tmp_path):
    copies(tmp_path / "source")
    alone = on_this_process(str(tmp_path / "source"), str(tmp_path / "alone"))
    assert run_on_processes(on_this_process, 2, str(tmp_path / "source"), str(tmp_path / "two")) == [alone, alone]
    assert recall_at_1(alone["during training"]["retrieval"]) == alone["of the set"] == [1, 1]
    assert content(tmp_path / "two") == content(tmp_path / "alone")
