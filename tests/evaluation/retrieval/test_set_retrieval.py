"""Retrieval of an embedded set: the metrics of its outcomes, with intervals; the same on any number of processes."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_on_processes

from modstruct import distributed
from modstruct.data.faults import BadSample
from modstruct.distributed.collect import on_main
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.examples import write_retrieved_examples
from modstruct.evaluation.result import Result
from modstruct.evaluation.retrieval import measure as measure_module
from modstruct.evaluation.retrieval.measure import (
    RetrievalConfig,
    measure,
    measure_retrieval,
    query_shares,
)
from modstruct.evaluation.statistics import bootstrap_mean

CONFIG = RetrievalConfig(resamples=200)
DIRECTIONS = ("text_to_image", "image_to_text")


def write_set(folder, images=50, captions=3, dtype=np.float16, **more) -> EmbeddedSet:
    random = np.random.default_rng(0)
    image = random.standard_normal((images, 24))
    text = np.repeat(image, captions, axis=0) + 1.5 * random.standard_normal((images * captions, 24))
    image, text = ((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype) for rows in (image, text))
    pairs = np.stack([np.arange(images * captions) // captions, np.arange(images * captions)], axis=1)
    return EmbeddedSet(
        "made",
        {"name": "none", "fingerprint": "f"},
        {"image": image, "text": text} | more.pop("arrays", {}),
        pairs=more.pop("pairs", pairs),
        captions=[f"caption {n}" for n in range(len(text))],
        source={"name": "made", "fingerprint": "abc"},
    ).save(folder)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    # Caption 4, of image 1, is one of image 7 too; image 49 has no caption of its own.
    pairs = np.stack([np.arange(147) // 3, np.arange(147)], axis=1)
    return write_set(tmp_path_factory.mktemp("set"), pairs=np.concatenate([pairs, [[7, 4]]]))


@pytest.fixture(scope="module")
def measured(embedded):
    return measure(embedded, CONFIG)


def test_embeddings_without_unit_norm_are_refused(tmp_path):
    whole = write_set(tmp_path)
    np.save(tmp_path / "image.npy", np.zeros_like(whole.rows("image")))  # as a disk may give them back
    with pytest.raises(ValueError, match="unit norm is needed, and row 0 has norm 0"):
        measure(EmbeddedSet.open(tmp_path), CONFIG)


def test_metrics_are_those_of_the_arrays_and_the_means_of_their_outcomes(embedded, measured):
    plain = measure_retrieval(*(embedded.rows(name) for name in ("image", "text")), embedded.pairs)
    outcomes = measured.outcomes
    for direction in DIRECTIONS:
        metrics = measured.grouped[direction]
        assert metrics.keys() == plain[direction].keys()
        for name, metric in metrics.items():
            assert {"value": metric.value, "chance": metric.chance} == plain[direction][name]
            assert metric.low <= metric.value <= metric.high
            assert metric.rows == measured.rows[f"{direction}_queries"]
            if name != "median_rank":
                assert outcomes[f"{direction}/{name}"].mean() == pytest.approx(metric.value, abs=1e-12)
                assert metric.high - metric.low < (1 if name == "mean_log_rank" else 0.5)
        assert np.median(outcomes[f"{direction}/rank"]) == metrics["median_rank"].value
        lengths = {len(values) for name, values in outcomes.items() if name.startswith(direction)}
        assert lengths == {measured.rows[f"{direction}_queries"]}
    sizes = {"image": 50, "text": 150, "pairs": 148, "text_to_image_queries": 147, "image_to_text_queries": 49}
    sizes["mixed_queries"] = 196
    assert measured.rows == sizes
    assert (measured.metric, measured.set, measured.fingerprint) == ("retrieval", "made", "abc")


def test_a_result_declares_what_its_values_are(measured, tmp_path):
    recall, rank = (measured.values[f"text_to_image/{name}"] for name in ("recall_at_5", "median_rank"))
    assert (recall.label, recall.unit, recall.higher_is_better) == ("R@5", "share", True)
    assert (rank.label, rank.unit, rank.higher_is_better) == ("median rank", "rank", False)
    logarithm = measured.values["image_to_text/mean_log_rank"]
    assert (logarithm.unit, logarithm.higher_is_better) == ("number", False)
    assert recall.about == "Recall at 5: the share of the queries whose rank is at most 5."
    assert all(value.about for value in measured.values.values())
    groups = {"text_to_image": "Text → image", "image_to_text": "Image → text"}
    assert measured.groups == groups | {"mixed": "One gallery of images and texts, by pair"}
    assert measured.headlines == ("text_to_image/recall_at_1", "image_to_text/recall_at_1")
    assert measured.settings["engine"] == "exact"
    measured.save(tmp_path / "retrieval.json")
    assert Result.load(tmp_path / "retrieval.json").values == measured.values


def test_captions_of_one_image_are_resampled_together(measured):
    outcomes = measured.outcomes
    group = outcomes["text_to_image/group"]
    assert group.tolist() == (np.arange(147) // 3).tolist()  # caption 4 with image 1, the first of its two
    hits, metric = outcomes["text_to_image/recall_at_1"], measured.values["text_to_image/recall_at_1"]
    assert (metric.low, metric.high) == bootstrap_mean(hits, samples=200, groups=group)
    assert outcomes["image_to_text/group"].tolist() == outcomes["image_to_text/query"].tolist() == list(range(49))


def test_curves_are_recall_at_each_k_that_both_galleries_have(measured):
    for direction in DIRECTIONS:
        curve = measured.curves[f"{direction}/recall"]
        assert curve.x == [1, 2, 5, 10, 20, 50]
        assert curve.y == [np.mean(measured.outcomes[f"{direction}/rank"] <= k) for k in curve.x]
        for k in (1, 5, 10):
            value, at = measured.values[f"{direction}/recall_at_{k}"], curve.x.index(k)
            assert (curve.low[at], curve.high[at], curve.chance[at]) == (value.low, value.high, value.chance)
    assert measured.curves["image_to_text/recall"].chance[-1] == pytest.approx(
        1 - comb(147, 50) / comb(150, 50), abs=0.01
    )


def test_one_pair_has_metrics_and_no_interval(tmp_path):
    result = measure(write_set(tmp_path, images=1, captions=1), CONFIG)
    recall = result.values["text_to_image/recall_at_1"]
    assert (recall.value, recall.chance, recall.low, recall.high) == (1, 1, None, None)
    curve = result.curves["text_to_image/recall"]
    assert (curve.x, curve.y, curve.low) == ([1], [1], None)


def test_ties_are_named(tmp_path, caplog):
    same = np.zeros((4, 24), np.float32) + np.eye(24, dtype=np.float32)[0]
    result = measure(write_set(tmp_path, images=4, captions=1, arrays={"image": same}), CONFIG)
    assert result.values["text_to_image/tied_queries"].value == 4
    assert "image_to_text/tied_queries" not in result.values
    assert "set made, text to image: the best positive of 4 of 4 queries ties exactly" in caplog.text


@pytest.mark.parametrize("engine", ["faiss_flat", "hnsw"])
def test_an_engine_is_noted_and_approximate_lists_tell_their_recall(embedded, measured, engine):
    result = measure(embedded, RetrievalConfig(engine=engine, resamples=200))
    assert result.settings["engine"] == engine
    for name, value in measured.values.items():
        assert result.values[name].value == pytest.approx(value.value, abs=0.01), name
    told = {group: result.groups[group] for group in result.groups if group.startswith("index")}
    if engine == "faiss_flat":
        assert told == {}
    else:
        assert told["index_text_to_image"] == "Approximate lists, text → image"
        recall = result.values["index_text_to_image/recall_at_10"]
        assert (recall.label, recall.rows) == ("R@10", 150)
        assert 0.9 < recall.value <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: EmbeddedSet("x", {}, {"image": np.eye(3, dtype=np.float32)}),
            "array = 'text'.*embed it with",
        ),
        (lambda f: write_set(f, pairs=np.empty((0, 2), np.int64)), "pairs = .*has none: embed one whose images"),
    ],
)
def test_a_set_without_texts_or_pairs_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        measure(change(tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"recall_at": (0,)}, "retrieval.recall_at = 0: at least 1"),
        ({"recall_at": ()}, "give at least one K"),
        ({"curve_at": (-1,)}, "retrieval.curve_at = -1"),
        ({"resamples": 10}, "retrieval.resamples = 10"),
        ({"mixed_queries": -1}, "retrieval.mixed_queries = -1: at least 0"),
        ({"engine": "annoy"}, "retrieval.engine = 'annoy': one of exact, faiss_flat, ivf, hnsw, cagra"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**setting)


# On several processes.


ENGINES = ("exact", "faiss_flat", "hnsw")


def seen_by(embedded: EmbeddedSet, engine: str) -> dict:
    result = measure(embedded, RetrievalConfig(engine=engine, resamples=200))
    return result.to_json() | {"outcomes": {name: rows.tolist() for name, rows in result.outcomes.items()}}


def on_process(folder: str) -> dict:
    embedded = EmbeddedSet.open(folder)
    seen = {engine: seen_by(embedded, engine) for engine in ENGINES}
    seen["alone"] = on_main(lambda: measure_retrieval(*map(embedded.rows, ("image", "text")), embedded.pairs, [1]))
    seen["failed"] = fail_on_last(embedded)
    return seen


def fail_on_last(embedded) -> str:
    def fail(*_):
        raise ArithmeticError("lost")

    if distributed.rank() == distributed.world_size() - 1:
        measure_module.pairs_ahead = fail
    try:
        measure(embedded)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("count", [2, 3])
def test_results_are_equal_on_any_number_of_processes_and_on_each(embedded, count):
    alone = {engine: json.loads(json.dumps(seen_by(embedded, engine))) for engine in ENGINES}
    results = run_on_processes(on_process, count, str(embedded.folder))
    for seen in results:
        assert json.loads(json.dumps({engine: seen[engine] for engine in ENGINES})) == alone
        for way in DIRECTIONS:
            value = alone["exact"]["values"][f"{way}/recall_at_1"]
            assert seen["alone"][way]["recall_at_1"] == {"value": value["value"], "chance": value["chance"]}
    assert [seen["failed"] for seen in results][-1] == "ArithmeticError: lost"
    assert "another process failed first" in results[0]["failed"]
    assert "ArithmeticError: lost" in results[0]["failed"]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
def test_shares_hold_every_pair_once_and_divide_no_query(processes):
    query = np.repeat(np.arange(11), np.random.default_rng(0).integers(1, 9, 11))
    pairs = np.stack([query, np.arange(len(query))], axis=1)
    shares = query_shares(np.random.default_rng(1).permutation(pairs), processes)
    asked = [set(share[:, 0].tolist()) for share in shares]
    assert sorted(np.concatenate(shares).tolist()) == pairs.tolist()
    assert sum(map(len, asked)) == 11
    assert max(map(len, asked)) - min(map(len, asked)) <= 1
    assert len(shares) == min(processes, 11)


# Examples.


def numbered(row: int) -> Image.Image:
    """Row n is a grey image of n; row 3 is lost."""
    if row == 3:
        raise BadSample("undecodable image", "somewhere")
    return Image.new("RGB", (600, 300), (row, row, row))


def test_examples_show_what_comes_first_and_what_is_right(embedded, measured, tmp_path):
    (tmp_path / "retrieved-9999.jpg").write_bytes(b"of an earlier model")
    write_retrieved_examples(embedded, dict(measured.outcomes), numbered, tmp_path, queries=5)
    examples = json.loads((tmp_path / "examples.json").read_text())["examples"]
    assert [example["direction"] for example in examples] == ["text_to_image"] * 5 + ["image_to_text"] * 5
    image, text = (embedded.rows(name).astype(np.float64) for name in ("image", "text"))
    named = set()
    for example in examples:
        by_text, query = example["direction"] == "text_to_image", int(example["query"]["key"])
        scores = image @ text[query] if by_text else text @ image[query]
        right = embedded.pairs[embedded.pairs[:, int(by_text)] == query, 1 - int(by_text)]
        results = example["results"]
        assert [int(item["key"]) for item in results] == np.argsort(-scores)[:5].tolist()
        assert [item["score"] for item in results] == pytest.approx(np.sort(scores)[::-1][:5])
        assert [item["right"] for item in results] == [int(item["key"]) in right for item in results]
        assert example["rank"] == np.sum(np.delete(scores, right) >= scores[right].max()) + 1
        assert int(example["right"]["key"]) == right[scores[right].argmax()]
        found = [*results, example["right"]]
        images = found if by_text else [example["query"]]
        for item in found if not by_text else [example["query"]]:
            assert item["text"] == f"caption {item['key']}"
        for item in images:
            if item["key"] == "3":
                assert "image" not in item
                continue
            named.add(item["image"])
            with Image.open(tmp_path / item["image"]) as opened:
                assert opened.size == (256, 128)
                assert abs(opened.convert("L").getpixel((5, 5)) - int(item["key"])) <= 2
    assert {path.name for path in Path(tmp_path).glob("*.jpg")} == named


def test_the_same_queries_are_shown_whatever_the_model(embedded, measured, tmp_path):
    write_retrieved_examples(embedded, dict(measured.outcomes), numbered, tmp_path, queries=1000)
    examples = json.loads((tmp_path / "examples.json").read_text())["examples"]
    queries = [int(e["query"]["key"]) for e in examples if e["direction"] == "text_to_image"]
    assert queries == dict(measured.outcomes)["text_to_image/query"].tolist()
