"""Evaluation gives the same metrics on any number of processes, and none of them waits for another for ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numbered_images import CLASS_FILE, LastNumberTokenizer, LookUp, open_source, views, write_source
from processes import run_on_processes

from modstruct.config import EvaluationConfig
from modstruct.data.run_data import EvaluationData
from modstruct.distributed import is_main
from modstruct.distributed.collect import on_main
from modstruct.evaluation.classification import linear_probe, zero_shot
from modstruct.evaluation.classification.linear_probe import AdamWProbeConfig, FewShotConfig, LinearProbeConfig
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.information import measure as information
from modstruct.evaluation.information import private
from modstruct.evaluation.information.probes import ProbeConfig
from modstruct.evaluation.retrieval import measure as retrieval
from modstruct.evaluation.retrieval.measure import RetrievalConfig
from modstruct.evaluation.structure import measure as structure
from modstruct.evaluation.structure.measure import StructureConfig

SIZES = {"many": 43, "few": 5}  # with batches of four, "few" leaves the third of three processes without a sample


def measure(folder: str, broken: tuple[int, ...] = ()) -> dict:
    """What one process sees: metrics and calls for each source, and the errors that reach it."""
    results = {}
    for name in SIZES:
        encode, seen = LookUp(noise=0.8), []
        found = run(Path(folder) / name, encode, lambda source, seen=seen: seen.append(source.rows("image").tolist()))
        found["retrieval"] = replace(found["retrieval"], seconds=None)
        results[name] = {
            "results": {metric: result.to_json() for metric, result in found.items()},
            "calls": [call for call, _ in encode.calls],
            "seen": seen,
        }
    made = labelled_set()
    results["set"] = {"shared": metrics_of(made), "alone": on_main(lambda: metrics_of(made))}
    made.splits = {"train": labelled_set(broken=is_main())}  # as where one process alone cannot read a file
    results["probe error"] = error_of(
        lambda: linear_probe.measure_few_shot(made, FewShotConfig(shots=(1,), strength=1.0))
    )
    results["label error"] = error_of(lambda: run(Path(folder) / "unlabelled", LookUp()))
    results["main error"] = error_of(lambda: run(Path(folder) / "few", LookUp(), fail_on_main))
    results["bad share"] = error_of(lambda: run(Path(folder) / "bad", LookUp()))
    return results


def labelled_set(broken: bool = False) -> EmbeddedSet:
    """Images in three classes with two captions each, and a training split of its own."""
    random, labels = np.random.default_rng(0), np.arange(90) % 3
    features = np.eye(3)[labels] @ random.normal(size=(3, 8)) + random.normal(size=(90, 8))
    arrays = {"image_features": features, "image": features, "image_augmented": features[::-1]}
    arrays["text"] = np.repeat(features, 2, axis=0) + random.normal(size=(180, 8))
    for name in ("image", "image_augmented", "text"):
        arrays[name] = arrays[name] / np.linalg.norm(arrays[name], axis=1, keepdims=True)
    arrays = {name: rows.astype(np.float32) for name, rows in arrays.items()}
    if broken:
        arrays["image_features"][5] = np.nan
    pairs = np.stack([np.arange(180) // 2, np.arange(180)], axis=1)
    prompts = random.normal(size=(3, 4, 8)).astype(np.float32)
    names, templates = ["a", "b", "c"], [f"{n} {{}}" for n in range(4)]
    classes = {"labels": labels, "class_prompts": prompts, "class_names": names, "templates": templates}
    return EmbeddedSet("made", {}, arrays, pairs=pairs, **classes)


def metrics_of(made: EmbeddedSet) -> dict[str, list[float]]:
    """Each metric's values and intervals, and how all its outcomes add up."""
    made.splits = {"train": made}
    probes = ProbeConfig(folds=2, strengths=(1.0, 10.0), iterations=20, hidden=8, epochs=2, words=0, samples=100)
    sampled = StructureConfig(exact_rows=60, batch=10, batches=10, hubness_batch=20, separability_pairs=40)
    found = (
        zero_shot.measure(made),
        structure.measure(made),
        structure.measure(made, sampled),
        retrieval.measure(made, RetrievalConfig(resamples=100)),
        linear_probe.measure(made),
        linear_probe.measure_adamw(made, LinearProbeConfig(adamw=AdamWProbeConfig(epochs=3))),
        linear_probe.measure_few_shot(made, FewShotConfig(shots=(1, 2), draws=3)),
        information.measure(made, probes),
        private.measure(made, replace(probes, labels=["label"])),
    )
    numbers = {}
    for place, result in enumerate(found):
        for name, value in result.values.items():
            several = value.value, value.low, value.high, value.deviation
            numbers[f"{place} {result.metric} {name}"] = [-1.0 if n is None else n for n in several]
        for name, outcome in result.outcomes.items():
            numbers[f"{place} {result.metric} outcome {name}"] = [float(outcome.sum()), float(len(outcome))]
    return numbers


def run(folder, encode, inspect=None):
    config = EvaluationConfig(batch=4, recall_at=[1, 5], top_k=[1])
    samples, classes = open_source(folder), str(folder.parent / "classes.yaml")
    data = EvaluationData(views(), LastNumberTokenizer(), samples, classes)
    return evaluate(encode, samples, data, config, inspect=inspect)


def fail_on_main(_):
    raise ArithmeticError("inspection failed")


def error_of(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{is_main()} {type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Number of processes -> results by rank."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "classes.yaml").write_text(CLASS_FILE)
    for name, size in SIZES.items():
        # Several captions an image, and several images a caption.
        numbers = [i % (size - 2) for i in range(size)]
        broken = (8, 20) if name == "many" else ()
        write_source(folder / name, numbers, lambda n: [f"thing {n}", f"object {n}"], broken=broken)
    write_source(folder / "unlabelled", [1, 2, 3], label_of=lambda n: {"parity": "prime"})
    write_source(folder / "bad", list(range(40)), broken=range(36))
    return {1: [measure(str(folder))]} | {n: run_on_processes(measure, n, str(folder)) for n in (2, 3)}


@pytest.mark.parametrize("name", SIZES)
def test_metrics_are_equal_on_any_number_of_processes_and_on_each(results, name):
    (alone,) = results[1]
    assert 0 < alone["many"]["results"]["retrieval"]["values"]["text_to_image/recall_at_1"]["value"] < 1
    for processes in (2, 3):
        for result in results[processes]:
            assert result[name]["results"] == alone[name]["results"]
    assert alone["many"]["results"]["retrieval"]["settings"]["left_out"] == {"undecodable image": 2}


def test_metrics_of_a_set_are_equal_on_any_number_of_processes_and_within_on_main(results):
    (alone,) = results[1]
    expected = alone["set"]["shared"]
    assert len(expected) > 50
    for processes in (1, 2, 3):
        for result in results[processes]:
            for found in result["set"].values():
                assert found.keys() == expected.keys()
                for name, numbers in found.items():
                    assert numbers == pytest.approx(expected[name], rel=1e-7, abs=1e-7), name


@pytest.mark.parametrize("processes", [2, 3])
def test_a_set_that_cannot_be_measured_is_refused_on_every_process(results, processes):
    for result in results[processes]:
        assert "1 of 90 made's image_features embeddings are not finite" in result["probe error"]


@pytest.mark.parametrize("name", SIZES)
def test_every_process_encodes_equally_often(results, name):
    """ZeRO-3 gathers parameters in every forward: a process with fewer of them would leave the others waiting."""
    for processes in (2, 3):
        calls = [result[name]["calls"] for result in results[processes]]
        assert all(other == calls[0] for other in calls)
    most = max(len(result[name]["calls"]) for result in results[3])
    assert most < len(results[1][0][name]["calls"])  # the work is divided


def test_only_the_main_process_inspects_and_sees_the_source_in_order(results):
    for name in SIZES:
        alone = results[1][0][name]["seen"]
        for processes in (2, 3):
            assert [result[name]["seen"] for result in results[processes]] == [alone] + [[]] * (processes - 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_errors_reach_every_process(results, processes):
    for result in results[processes]:
        assert "ValueError: the label parity = 'prime'" in result["label error"]
        assert "TooManyBadSamples: data.max_bad_share" in result["bad share"]
    main, *others = [result["main error"] for result in results[processes]]
    assert main == "True ArithmeticError: inspection failed"
    assert set(others) == {"False FailedElsewhere: the main process failed first: ArithmeticError: inspection failed"}
