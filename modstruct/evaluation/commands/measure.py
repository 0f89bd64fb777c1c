"""All metrics of what was embedded: retrieval, zero-shot, structure, probes, information; each result is one file.

python launch_scripts/evaluate.py measure evaluations/scenes
deepspeed --num_gpus 8 launch_scripts/evaluate.py measure evaluations/laion --metrics retrieval zero_shot
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from modstruct import distributed
from modstruct.cli import config_parser, parse, parse_recipe_text, run
from modstruct.config import RunError
from modstruct.distributed import FailedElsewhere
from modstruct.evaluation.collect import on_main
from modstruct.evaluation.commands.embed import read_model
from modstruct.evaluation.commands.sets import open_set, splits_beside
from modstruct.evaluation.embedded_set import EmbeddedSet
from modstruct.evaluation.information import ProbeConfig, measure_information
from modstruct.evaluation.latent import SamplingConfig, measure_set_structure
from modstruct.evaluation.leakage import LEAKED_KEYS, leave_out, read_keys
from modstruct.evaluation.probes import FewShotConfig, LinearProbeConfig, measure_few_shot, measure_linear_probe
from modstruct.evaluation.ranking import RetrievalConfig, measure_set_retrieval, write_retrieved_examples
from modstruct.evaluation.zero_shot import measure_zero_shot
from modstruct.files import written_aside

log = logging.getLogger("modstruct")
USAGE = "[deepspeed [launcher options] | python] launch_scripts/evaluate.py measure EVALUATION… [--FIELD VALUE …]"
METRICS = ("retrieval", "zero_shot", "structure", "linear_probe", "linear_probe_sgd", "few_shot", "information")
PROBES = ("linear_probe", "linear_probe_sgd", "few_shot")
DEFAULT_FEATURES = ("image_features", "image_projected")
Probe = TypeVar("Probe", LinearProbeConfig, FewShotConfig)
Found = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass
class MeasureConfig:
    """How each metric measures."""

    again: bool = False
    """Measure anew what has a result already."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Needs captions."""
    top_k: list[int] = field(default_factory=lambda: [1, 3, 5])
    """Of zero-shot classification, which needs classes."""
    structure: SamplingConfig = field(default_factory=SamplingConfig)
    """Needs captions."""
    linear_probe: LinearProbeConfig = field(default_factory=LinearProbeConfig)
    """Needs classes and the training split (embed --all_splits). linear_probe_sgd is the same by CyCLIP's protocol, on
    image_projected."""
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    """Needs classes and the training split."""
    information: ProbeConfig = field(default_factory=ProbeConfig)
    """Needs captions and classes."""
    information_labels: list[str] = field(default_factory=list)
    """Fields of the metadata whose information is measured; by default the set's classes, of scenes all factors."""


def main(words: Sequence[str]) -> None:
    parser = config_parser(__doc__, USAGE, MeasureConfig)
    parser.add_argument("folders", nargs="+", help="Folders that `evaluate.py embed --out` wrote.")
    which = "Metrics; those that a set does not allow are left out, and the reason said."
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help=which)
    config, options = parse(parser, words)

    def measure_all() -> None:
        distributed.start_processes()
        problems = []
        for folder in options.folders:
            problems += measure(Path(folder).expanduser(), config, options.metrics, words)
        require_all(problems)

    run(measure_all)


def measure(out: Path, config: MeasureConfig, metrics: Sequence[str], words: Sequence[str]) -> list[str]:
    """Metrics of every set of an evaluation; every process calls it. Returns what could not be measured, and why.

    A metric that a set cannot have, such as 16 shots of a class of 5 pictures, does not stop the others.
    """
    problems: list[str] = []
    noted = read_model(out)
    beside = splits_beside(list(noted["sets"]))
    opened = {name: EmbeddedSet.open(out / "embeddings" / name) for name in noted["sets"]}
    for name, word in noted["sets"].items():
        if name in beside:
            continue
        splits = {split: opened[other] for other, (of, split) in beside.items() if of == name}
        for embedded in (opened[name], *_without_leaked(opened[name], out)):
            for metric in metrics:
                try:
                    _measure_one(metric, out / "results" / embedded.name, embedded, splits, config, words)
                except (ValueError, FailedElsewhere) as error:
                    problems.append(f"{embedded.name}, {metric}: {error}")
            if "retrieval" in metrics and len(embedded.pairs):
                _examples(out, noted, embedded, word)
    return problems


def require_all(problems: list[str]) -> None:
    """Raise RunError if something could not be measured."""
    if problems:
        raise RunError("all else was measured, but not\n  " + "\n  ".join(problems))


def _without_leaked(embedded: EmbeddedSet, out: Path) -> list[EmbeddedSet]:
    """The set without the pictures that tools/find_leakage.py found in the training source, if it looked and did."""
    found = out / "results" / embedded.name / LEAKED_KEYS
    keys = distributed.broadcast_object(read_keys(found) if distributed.is_main() and found.is_file() else [])
    if not keys:
        return []
    folder = out / "embeddings" / f"{embedded.name}-without-leaked"
    on_main(lambda: str(leave_out(embedded, keys, folder).folder))
    return [EmbeddedSet.open(folder)]


def _measure_one(
    metric: str,
    results: Path,
    embedded: EmbeddedSet,
    splits: dict[str, EmbeddedSet],
    config: MeasureConfig,
    words: Sequence[str],
) -> None:
    title = f"{embedded.name}, {metric.replace('_', ' ')}"
    missing = _missing(metric, embedded, splits)
    if missing:
        _say(f"{title}: left out, {missing}")
        return
    path = results / f"{metric}.json"
    if not config.again and distributed.broadcast_object(path.is_file()):
        _say(f"{title}: measured before ({path}); --again true measures it anew")
        return
    _say(f"{title} …")
    device, progress = distributed.device(), distributed.is_main()
    three = (splits.get("train"), embedded, splits.get("validation"))
    alone: dict[str, Callable[[], Found]] = {
        "zero_shot": lambda: measure_zero_shot(embedded, config.top_k, device),
        "structure": lambda: (measure_set_structure(embedded, config.structure), {}),
        "linear_probe": lambda: measure_linear_probe(
            *three, _with_features(config.linear_probe, splits), device, progress
        ),
        "linear_probe_sgd": lambda: measure_linear_probe(
            *three, _with_features(_by_sgd(config.linear_probe), splits), device, progress
        ),
        "few_shot": lambda: measure_few_shot(*three, _with_features(config.few_shot, splits), device, progress),
        "information": lambda: measure_information(
            embedded, config.information_labels, config.information, device, progress
        ),
    }
    if metric == "retrieval":  # which all processes share
        found = measure_set_retrieval(embedded, config.retrieval, progress=progress)
        on_main(lambda: _save(path, *found, words))
    else:
        on_main(lambda: _save(path, *alone[metric](), words))


def _by_sgd(probe: LinearProbeConfig) -> LinearProbeConfig:
    features = "image_projected" if probe.features == LinearProbeConfig().features else probe.features
    return replace(probe, method="sgd", features=features)


def _with_features(probe: Probe, splits: dict[str, EmbeddedSet]) -> Probe:
    """The probe on the shared embeddings, where its own default was not embedded."""
    missing = probe.features in DEFAULT_FEATURES and probe.features not in splits["train"].arrays
    return replace(probe, features="image") if missing else probe


def _missing(metric: str, embedded: EmbeddedSet, splits: dict[str, EmbeddedSet]) -> str | None:
    """Why a set does not allow a metric."""
    if metric in ("retrieval", "structure", "information") and not len(embedded.pairs):
        return "it has no captions"
    if metric in ("zero_shot", *PROBES, "information") and embedded.labels is None:
        return "it has no classes"
    if metric in PROBES and "train" not in splits:
        return "its training split is not embedded (embed --all_splits true)"
    return None


def _save(path: Path, result: dict[str, Any], outcomes: dict[str, np.ndarray], words: Sequence[str]) -> None:
    """METRIC.npz first, so that a METRIC.json always has its outcomes beside it."""
    if outcomes:
        with written_aside(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **outcomes)
    result |= {"metric": path.stem, "command": ["evaluate.py", "measure", *words]}
    with written_aside(path) as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _examples(out: Path, noted: dict[str, Any], embedded: EmbeddedSet, word: str) -> None:
    """Retrieved pictures and captions for the report, read from the source where it still is."""
    folder = out / "results" / embedded.name / "examples"
    if distributed.broadcast_object((folder / "examples.json").is_file()):
        return
    try:
        recipe = parse_recipe_text(noted["recipe"])
        recipe.data.allow_pipe = False  # whoever made the folder wrote it
        source = open_set(word, recipe, noted["image_size"])
    except (ValueError, OSError) as error:
        _say(f"{embedded.name}: no pictures of examples, since the set cannot be read any more: {error}")
        return

    def write() -> None:
        with np.load(folder.parent / "retrieval.npz") as outcomes:
            write_retrieved_examples(embedded, dict(outcomes), _Pictures(source.samples, embedded.indices), folder)

    on_main(write)


class _Pictures:
    """Pictures of a source by row of the embedded set."""

    def __init__(self, samples: Any, indices: np.ndarray):
        self.samples, self.indices = samples, indices

    def __getitem__(self, row: int):
        return self.samples[int(self.indices[row])].picture


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)
