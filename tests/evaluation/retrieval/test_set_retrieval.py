"""Retrieval of an embedded set: the metrics of its outcomes, with intervals; the same on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_on_processes

from modstruct import distributed
from modstruct.data.faults import BadSample
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, SetContents, write_embedded_set
from modstruct.evaluation.examples import write_retrieved_examples
from modstruct.evaluation.retrieval import exact
from modstruct.evaluation.retrieval.ann_index import IndexConfig
from modstruct.evaluation.retrieval.exact import query_shares, shared_pairs_ahead
from modstruct.evaluation.retrieval.measure import RetrievalConfig, measure_retrieval, measure_set_retrieval
from modstruct.evaluation.statistics import bootstrap_mean

CONFIG = RetrievalConfig(resamples=200)
DIRECTIONS = ("text_to_image", "image_to_text")


def write_set(folder, images=50, captions=3, dtype=np.float16, **more) -> EmbeddedSet:
    random = np.random.default_rng(0)
    image = random.standard_normal((images, 24))
    text = np.repeat(image, captions, axis=0) + 1.5 * random.standard_normal((images * captions, 24))
    image, text = ((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype) for rows in (image, text))
    pairs = np.stack([np.arange(images * captions) // captions, np.arange(images * captions)], axis=1)
    arrays = {"image": image, "text": text} | more.pop("arrays", {})
    return write_embedded_set(
        folder,
        SetContents(
            "made",
            {"name": "none", "fingerprint": "f"},
            arrays,
            pairs=more.pop("pairs", pairs),
            captions=[f"caption {n}" for n in range(len(text))],
            source={"name": "made", "fingerprint": "abc"},
            **more,
        ),
    )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    # Caption 4, of image 1, is one of image 7 too; image 49 has no caption of its own.
    pairs = np.stack([np.arange(147) // 3, np.arange(147)], axis=1)
    return write_set(tmp_path_factory.mktemp("set"), pairs=np.concatenate([pairs, [[7, 4]]]))


@pytest.fixture(scope="module")
def measured(embedded):
    return measure_set_retrieval(embedded, CONFIG)


def test_metrics_are_those_of_the_arrays_and_the_means_of_their_outcomes(embedded, measured):
    result, outcomes = measured
    plain = measure_retrieval(*(embedded.rows(name) for name in ("image", "text")), embedded.pairs)
    for direction in DIRECTIONS:
        metrics = result["figures"][direction]
        assert metrics.keys() == plain[direction].keys()
        for name, metric in metrics.items():
            assert {key: metric[key] for key in ("value", "chance")} == plain[direction][name]
            assert metric["low"] <= metric["value"] <= metric["high"]
            if name != "median_rank":
                assert outcomes[f"{direction}/{name}"].mean() == pytest.approx(metric["value"], abs=1e-12)
                assert metric["high"] - metric["low"] < 0.5
        assert np.median(outcomes[f"{direction}/rank"]) == metrics["median_rank"]["value"]
        lengths = {len(values) for name, values in outcomes.items() if name.startswith(direction)}
        assert lengths == {result["rows"][f"{direction}_queries"]}
    assert result["rows"] == {
        "image": 50,
        "text": 150,
        "pairs": 148,
        "text_to_image_queries": 147,
        "image_to_text_queries": 49,
    }
    assert (result["metric"], result["set"], result["source_fingerprint"]) == ("retrieval", "made", "abc")
    json.dumps(result, allow_nan=False)


def test_captions_of_one_image_are_resampled_together(measured):
    result, outcomes = measured
    group = outcomes["text_to_image/group"]
    assert group.tolist() == (np.arange(147) // 3).tolist()  # caption 4 with image 1, the first of its two
    hits, metric = outcomes["text_to_image/recall_at_1"], result["figures"]["text_to_image"]["recall_at_1"]
    assert (metric["low"], metric["high"]) == bootstrap_mean(hits, samples=200, groups=group)
    assert outcomes["image_to_text/group"].tolist() == outcomes["image_to_text/query"].tolist() == list(range(49))


def test_curves_are_recall_at_each_k_that_both_galleries_have(measured):
    result, outcomes = measured
    assert result["curves"]["k"] == [1, 2, 5, 10, 20, 50]
    for direction in DIRECTIONS:
        expected = [np.mean(outcomes[f"{direction}/rank"] <= k) for k in result["curves"]["k"]]
        assert result["curves"][f"{direction}/recall"] == expected


def test_one_pair_has_metrics_and_no_interval(tmp_path):
    result, _ = measure_set_retrieval(write_set(tmp_path, images=1, captions=1), CONFIG)
    assert result["figures"]["text_to_image"]["recall_at_1"] == {"value": 1.0, "chance": 1.0}
    assert result["curves"]["k"] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: write_embedded_set(f, SetContents("x", {}, {"image": np.eye(3)})), "array = 'text'.*embed it with"),
        (lambda f: write_set(f, pairs=np.empty((0, 2), np.int64)), "pairs = .*has none: embed one whose images"),
    ],
)
def test_a_set_without_texts_or_pairs_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        measure_set_retrieval(change(tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"recall_at": (0,)}, "retrieval.recall_at = 0: at least 1"),
        ({"recall_at": ()}, "give at least one K"),
        ({"curve_at": (-1,)}, "retrieval.curve_at = -1"),
        ({"resamples": 10}, "retrieval.resamples = 10"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**setting)


# On several processes.


def on_process(folder: str) -> dict:
    embedded = EmbeddedSet.open(folder)
    seen = {}
    for kind in ("exact", "hnsw"):
        result, outcomes = measure_set_retrieval(embedded, RetrievalConfig(index=IndexConfig(kind), resamples=200))
        seen[kind] = {name: result[name] for name in ("figures", "curves", "rows")}
        seen[kind]["outcomes"] = {name: values.tolist() for name, values in outcomes.items()}
    seen["failed"] = fail_on_last(embedded)
    return seen


def fail_on_last(embedded) -> str:
    def fail(*_):
        raise ArithmeticError("lost")

    if distributed.rank() == distributed.world_size() - 1:
        exact.pairs_ahead = fail
    try:
        shared_pairs_ahead(embedded.rows("text"), embedded.rows("image"), embedded.pairs[:, ::-1])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("count", [2, 3])
def test_results_are_equal_on_any_number_of_processes_and_on_each(embedded, count):
    alone = {}
    for kind in ("exact", "hnsw"):
        alone[kind] = measure_set_retrieval(embedded, RetrievalConfig(index=IndexConfig(kind), resamples=200))
    results = run_on_processes(on_process, count, str(embedded.folder))
    for seen in results:
        for kind, (result, outcomes) in alone.items():
            assert {name: seen[kind][name] for name in ("figures", "curves", "rows")} == {
                name: result[name] for name in ("figures", "curves", "rows")
            }
            assert seen[kind]["outcomes"] == {name: values.tolist() for name, values in outcomes.items()}
    assert [seen["failed"] for seen in results][-1] == "ArithmeticError: lost"
    assert "another process failed first: ArithmeticError: lost" in results[0]["failed"]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
def test_shares_hold_every_pair_once_and_divide_no_query(processes):
    query = np.repeat(np.arange(11), np.random.default_rng(0).integers(1, 9, 11))
    shares = query_shares(query, processes)
    assert np.concatenate([np.arange(len(query))[share.start : share.stop] for share in shares]).tolist() == list(
        range(len(query))
    )
    asked = [set(query[share.start : share.stop]) for share in shares]
    assert sum(map(len, asked)) == 11
    assert max(map(len, asked)) - min(map(len, asked)) <= 1


# Examples.


class Numbered:
    """Row n is a grey image of n; row 3 is lost."""

    def __getitem__(self, row):
        if row == 3:
            raise BadSample("undecodable image", "somewhere")
        return Image.new("RGB", (600, 300), (row, row, row))


def test_examples_show_what_comes_first_and_what_is_right(embedded, measured, tmp_path):
    (tmp_path / "retrieved-9999.jpg").write_bytes(b"of an earlier model")
    write_retrieved_examples(embedded, measured[1], Numbered(), tmp_path, queries=5)
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
        images = results if by_text else [example["query"]]
        for item in results if not by_text else [example["query"]]:
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
    write_retrieved_examples(embedded, measured[1], Numbered(), tmp_path, queries=1000)
    examples = json.loads((tmp_path / "examples.json").read_text())["examples"]
    queries = [int(e["query"]["key"]) for e in examples if e["direction"] == "text_to_image"]
    assert queries == measured[1]["text_to_image/query"].tolist()
