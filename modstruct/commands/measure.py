"""All metrics of embedded sets: retrieval, zero-shot, structure, probes, information; each result is one file.

python launch_scripts/evaluate.py measure evaluations/scenes
deepspeed --num_gpus 8 launch_scripts/evaluate.py measure evaluations/laion --metrics retrieval zero_shot
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modstruct import distributed
from modstruct.cli import config_parser, parse, parse_recipe_text, run
from modstruct.commands.arguments import own_cache, require_modest
from modstruct.commands.embed import read_model
from modstruct.commands.sets import read_set, splits_beside
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.distributed import FailedElsewhere
from modstruct.distributed.collect import on_main
from modstruct.distributed.run_lock import held
from modstruct.errors import LostProcess, RunError, printable
from modstruct.evaluation.classification import few_shot, linear_probe, zero_shot
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.examples import write_retrieved_examples
from modstruct.evaluation.information.measure import measure as measure_information
from modstruct.evaluation.information.probes import ProbeConfig
from modstruct.evaluation.leakage.leave_out import LEAKED_KEYS, leave_out, read_keys
from modstruct.evaluation.result import Result
from modstruct.evaluation.retrieval.measure import RetrievalConfig
from modstruct.evaluation.retrieval.measure import measure as measure_retrieval
from modstruct.evaluation.structure.measure import StructureConfig
from modstruct.evaluation.structure.measure import measure as measure_structure
from modstruct.files import atomic_write, require_writable
from modstruct.stopping import stage

USAGE = "[deepspeed [launcher options] | python] launch_scripts/evaluate.py measure EVALUATION… [--FIELD VALUE …]"
METRICS = ("retrieval", "zero_shot", "structure", "linear_probe", "linear_probe_adamw", "few_shot", "information")
PROBES = ("linear_probe", "linear_probe_adamw", "few_shot")


@dataclass
class MeasureConfig:
    """How each metric measures."""

    again: bool = False
    """Measure again where there is a result already."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Needs captions."""
    top_k: list[int] = field(default_factory=lambda: [1, 3, 5])
    """Of zero-shot classification, which needs classes."""
    structure: StructureConfig = field(default_factory=StructureConfig)
    """Needs captions."""
    linear_probe: linear_probe.LinearProbeConfig = field(default_factory=linear_probe.LinearProbeConfig)
    """Needs classes and the training split (embed --all_splits). linear_probe_adamw is the same by CyCLIP's protocol,
    on image_projected."""
    few_shot: few_shot.FewShotConfig = field(default_factory=few_shot.FewShotConfig)
    """Needs classes and the training split."""
    information: ProbeConfig = field(default_factory=ProbeConfig)
    """Needs captions, and classes or information_labels."""
    information_labels: list[str] = field(default_factory=list)
    """Fields of the metadata whose information is measured; by default the set's classes, of scenes all factors."""


def main(words: Sequence[str]) -> None:
    parser = config_parser(__doc__, USAGE, MeasureConfig)
    parser.add_argument("folders", nargs="+", help="Folders that `evaluate.py embed --out` wrote.")
    which = "Metrics; those that a set does not allow are left out, with the reason."
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help=which)
    config, options = parse(parser, words, _with_present_names)

    def measure_all() -> None:
        distributed.start_processes()
        problems = []
        for folder in (Path(folder).expanduser() for folder in options.folders):
            on_main(partial(read_model, folder))  # before the lock, which would make a folder that is misspelt
            with held(folder, "EVALUATION"), stage("what was measured is kept; the same command measures the rest"):
                problems += measure(folder, config, options.metrics, words)
        require_all(problems)

    run(measure_all)


def _with_present_names(words: Sequence[str]) -> list[str]:
    """Options and metrics of the AdamW probe by their present names, where a command has those of older versions."""
    return [re.sub(r"^(--)?linear_probe(_|\.)sgd(?=$|[.=])", r"\1linear_probe\2adamw", word) for word in words]


def measure(out: Path, config: MeasureConfig, metrics: Sequence[str], words: Sequence[str]) -> list[str]:
    """Metrics of every set of an evaluation; every process calls it. Returns what could not be measured, and why.

    A metric that a set cannot have, such as 16 shots of a class of 5 images, does not stop the others.
    """
    problems: list[str] = []

    def attempt(title: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (ValueError, RuntimeError, OSError) as error:  # raised on all processes, by `on_main`
            if LostProcess.if_it_is(error):
                raise
            problems.append(f"{title}: {error}")

    noted = on_main(lambda: read_model(out))
    beside = splits_beside(list(noted["sets"]))
    opened = {name: EmbeddedSet.open(out / "embeddings" / name) for name in noted["sets"]}

    def check() -> None:
        for embedded in opened.values():
            embedded.check()

    on_main(check)  # or damage is found hours later
    for name in noted["sets"]:
        if name in beside:
            continue
        splits = {split: opened[other] for other, (of, split) in beside.items() if of == name}
        sets = [opened[name]]
        attempt(f"{name}, without what leaked", partial(_add_without_leaked, sets, out))
        for embedded in sets:
            results = out / "results" / embedded.name
            for metric in metrics:
                step = partial(_measure_one, metric, results, embedded, splits, config, words)
                attempt(f"{embedded.name}, {metric}", step)
            if "retrieval" in metrics and len(embedded.pairs):
                step = partial(on_main, partial(_write_examples, results, noted, embedded, noted["sets"][name]))
                attempt(f"{embedded.name}, retrieved examples", step)
    return problems


def require_all(problems: list[str]) -> None:
    """Raise RunError if something could not be measured; the main process reports it."""
    if problems:
        kind = RunError if distributed.is_main() else FailedElsewhere
        raise kind("all else was measured, but not\n  " + "\n  ".join(problems))


def _add_without_leaked(sets: list[EmbeddedSet], out: Path) -> None:
    """To a set, add it without the images that tools/find_leakage.py found in the training source, if there are any."""
    (embedded,) = sets
    found = out / "results" / embedded.name / LEAKED_KEYS
    folder = out / "embeddings" / f"{embedded.name}-without-leaked"

    def write() -> bool:
        keys = read_keys(found) if found.is_file() else []
        return bool(keys and leave_out(embedded, keys, folder))

    if on_main(write):
        sets.append(EmbeddedSet.open(folder))


def _measure_one(
    metric: str,
    results: Path,
    embedded: EmbeddedSet,
    splits: dict[str, EmbeddedSet],
    config: MeasureConfig,
    words: Sequence[str],
) -> None:
    title = f"{embedded.name}, {metric.replace('_', ' ')}"
    missing = _missing(metric, embedded, splits, config)
    if missing:
        _print(f"{title}: left out, {missing}")
        return
    path = results / f"{metric}.json"
    if not config.again and on_main(lambda: _measured(path) == identity(embedded)):
        _print(f"{title}: measured before ({path}); --again true measures it again")
        return
    on_main(lambda: require_writable("results", results))
    _print(f"{title} …")
    embedded.splits = splits
    measures: dict[str, Callable[[], Result]] = {
        "zero_shot": lambda: zero_shot.measure(embedded, zero_shot.ZeroShotConfig(tuple(config.top_k))),
        "retrieval": lambda: measure_retrieval(embedded, config.retrieval),
        "structure": lambda: measure_structure(embedded, config.structure),
        "linear_probe": lambda: linear_probe.measure(embedded, config.linear_probe),
        "linear_probe_adamw": lambda: linear_probe.measure_adamw(embedded, config.linear_probe),
        "few_shot": lambda: few_shot.measure(embedded, config.few_shot),
        "information": lambda: measure_information(embedded, _information(config)),
    }
    result = measures[metric]()
    command = ("evaluate.py", "measure", *words)
    on_main(lambda: replace(result, command=command, embeddings=identity(embedded)).save(path))


def _information(config: MeasureConfig) -> ProbeConfig:
    return replace(config.information, labels=config.information.labels or config.information_labels)


def _missing(metric: str, embedded: EmbeddedSet, splits: dict[str, EmbeddedSet], config: MeasureConfig) -> str | None:
    """Why a set does not allow a metric."""
    if metric in ("retrieval", "structure", "information") and not len(embedded.pairs):
        return "it has no captions"
    by_label = metric == "information" and not _information(config).labels
    if (metric in ("zero_shot", *PROBES) or by_label) and embedded.labels is None:
        return "it has no classes"
    if metric in PROBES and "train" not in splits:
        return "its training split is not embedded (embed --all_splits true)"
    return None


def _measured(path: Path) -> str | None:
    """Identity of the embeddings that a result is of; None where there is no result."""
    try:
        return json.loads(path.read_bytes()).get("embeddings")
    except (FileNotFoundError, ValueError):
        return None


def identity(embedded: EmbeddedSet) -> str:
    """What tells a set's embeddings from others of its name."""
    about = [
        embedded.model["fingerprint"],
        embedded.source,
        embedded.manifest.get("settings"),
        embedded.manifest["dtype"],
        *(["copies apart"] if len(embedded.copies) else []),  # an earlier version measured them as images
    ]
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def _save(
    path: Path,
    result: dict[str, Any],
    outcomes: dict[str, np.ndarray],
    embedded: EmbeddedSet,
    words: Sequence[str],
) -> None:
    """The result, and METRIC.npz first, so that a METRIC.json always has its own outcomes beside it."""
    command = ["evaluate.py", "measure", *words]
    result |= {"metric": path.stem, "command": command, "embeddings": identity(embedded)}
    content = (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()
    path.unlink(missing_ok=True)
    if outcomes:
        with atomic_write(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **outcomes)  # type: ignore[arg-type]  # numpy's types take it for allow_pickle
    with atomic_write(path) as file:
        file.write(content)


def _print(line: str) -> None:
    if distributed.is_main():
        print(printable(line), flush=True)


def _write_examples(results: Path, noted: dict[str, Any], embedded: EmbeddedSet, noted_set: dict[str, str]) -> None:
    """Write retrieved images and captions for the report, unless they are newer than the retrieval; one process does.

    noted: what `embed` noted of the evaluation, noted_set: of the set. Raises ValueError or OSError where the source
    can no longer be read, or has changed.
    """
    retrieval, listed = results / "retrieval.npz", results / "examples" / "examples.json"
    if not retrieval.is_file() or (listed.is_file() and listed.stat().st_mtime_ns > retrieval.stat().st_mtime_ns):
        return
    recipe = parse_recipe_text(noted_set["recipe"])
    # Whoever made the folder wrote them.
    require_modest(recipe_to_dict(recipe) | {"model": {"vision": {"image_size": noted["image_size"]}}})
    recipe.data.allow_pipe, recipe.data.cache = False, str(own_cache(recipe.data.cache))
    source = read_set(noted_set["word"], recipe, noted["image_size"])
    embedded_of = embedded.source.get("of", embedded.source.get("fingerprint"))
    if source.fingerprint != embedded_of:
        raise ValueError(f"{noted_set['word']} no longer holds the embedded samples: embed it again")
    with np.load(retrieval, allow_pickle=False) as outcomes:
        write_retrieved_examples(embedded, dict(outcomes), _Images(source.samples, embedded.indices), listed.parent)


class _Images:
    """Images of a source by row of the embedded set."""

    def __init__(self, samples: Any, indices: np.ndarray):
        self.samples, self.indices = samples, indices

    def __getitem__(self, row: int):
        return self.samples[int(self.indices[row])].image
