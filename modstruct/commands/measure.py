"""All metrics of embedded sets: retrieval, zero-shot, structure, probes, information; each result is one file.

python launch_scripts/evaluate.py measure evaluations/scenes
deepspeed --num_gpus 8 launch_scripts/evaluate.py measure evaluations/laion --metrics retrieval zero_shot
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modstruct import distributed
from modstruct.cli import config_parser, parse, parse_recipe_text, run
from modstruct.commands.arguments import own_cache, require_modest
from modstruct.commands.embed import read_model
from modstruct.commands.sets import read_set, splits_beside
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.synthetic.information import split_of_scenes
from modstruct.distributed import FailedElsewhere
from modstruct.distributed.collect import on_main
from modstruct.distributed.run_lock import held
from modstruct.errors import LostProcess, RunError, printable, require
from modstruct.evaluation.classification import linear_probe, zero_shot
from modstruct.evaluation.classification.linear_probe import FewShotConfig
from modstruct.evaluation.embeddings.derived import centred, without
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.examples import write_retrieved_examples
from modstruct.evaluation.information import measure as information
from modstruct.evaluation.information import private
from modstruct.evaluation.leakage.result import LEAKED_KEYS, read_keys
from modstruct.evaluation.result import Result
from modstruct.evaluation.retrieval import measure as retrieval
from modstruct.evaluation.structure import measure as structure
from modstruct.files import require_writable
from modstruct.stopping import stage

USAGE = "[deepspeed [launcher options] | python] launch_scripts/evaluate.py measure EVALUATION… [--FIELD VALUE …]"
RENAMED = {
    "linear_probe_sgd": "linear_probe_adamw",
    "--linear_probe.sgd": "--linear_probe.adamw",
    "--top_k": "--zero_shot.top_k",
    "--information_labels": "--information.labels",
    "--retrieval.index.kind": "--retrieval.engine",
}
"""How options and metrics of older versions begin, and how today."""
CAPTIONS, CLASSES = "captions", "classes (shards get some as --sets CLASSES.yaml@SHARDS)"
TRAINING = (
    "embedded training split (embed --all_splits true; shards of your own have splits by a set file, SET.yaml, with "
    "images: {train: SHARDS, test: SHARDS})"
)
FACTORS = "factors known to be of one modality alone (name fields: measure --information.labels NAME)"


@dataclass
class MeasureConfig:
    """How each metric measures."""

    again: bool = False
    """Measure again where there is a result already."""
    centre: bool = False
    """Measure each set NAME a second time as NAME-centred: shared embeddings less the mean of their modality over the
    set's distinct images, or captions, and of unit norm again (post-hoc centring). Class prompts are less the mean
    caption or, in a set without captions, the mean prompt. Probes of a training split are left out."""
    retrieval: retrieval.RetrievalConfig = field(default_factory=retrieval.RetrievalConfig)
    """Needs captions."""
    zero_shot: zero_shot.ZeroShotConfig = field(default_factory=zero_shot.ZeroShotConfig)
    """Needs classes."""
    structure: structure.StructureConfig = field(default_factory=structure.StructureConfig)
    """Needs captions."""
    linear_probe: linear_probe.LinearProbeConfig = field(default_factory=linear_probe.LinearProbeConfig)
    """Needs classes and the training split (embed --all_splits). linear_probe_adamw is the same by CyCLIP's protocol,
    on image_projected."""
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    """Needs classes and the training split."""
    information: information.ProbeConfig = field(default_factory=information.ProbeConfig)
    """Needs captions, and classes or information.labels. private_factors is measured by the same probes and labels, by
    default of built-in scenes alone."""


METRICS: dict[str, tuple[Callable[[EmbeddedSet, Any], Result], str, set[str]]] = {
    "retrieval": (retrieval.measure, "retrieval", {CAPTIONS}),
    "zero_shot": (zero_shot.measure, "zero_shot", {CLASSES}),
    "structure": (structure.measure, "structure", {CAPTIONS}),
    "linear_probe": (linear_probe.measure, "linear_probe", {CLASSES, TRAINING}),
    "linear_probe_adamw": (linear_probe.measure_adamw, "linear_probe", {CLASSES, TRAINING}),
    "few_shot": (linear_probe.measure_few_shot, "few_shot", {CLASSES, TRAINING}),
    "information": (information.measure, "information", {CAPTIONS, CLASSES}),
    "private_factors": (private.measure, "information", {CAPTIONS, FACTORS}),
}
"""What measures, its section of MeasureConfig, and what a set must have."""


def main(words: Sequence[str]) -> None:
    parser = config_parser(__doc__, USAGE, MeasureConfig)
    parser.add_argument("folders", nargs="+", help="Folders that `evaluate.py embed --out` wrote.")
    which = "Metrics; those that a set does not allow are left out, with the reason."
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), help=which)
    parser.add_argument("--sets", nargs="+", help="Names of the sets to measure (default: all that were embedded).")
    config, options = parse(parser, words, _with_present_names)

    def measure_all() -> None:
        distributed.start_processes()
        problems = []
        for folder in (Path(folder).expanduser() for folder in options.folders):
            on_main(partial(read_model, folder))  # before the lock, which would make a folder that is misspelt
            with held(folder, "EVALUATION"), stage("what was measured is kept; the same command measures the rest"):
                problems += measure(folder, config, options.metrics, words, options.sets)
        require_all(problems)

    run(measure_all)


def _with_present_names(words: Sequence[str]) -> list[str]:
    """The command line with the present names of options and metrics, where it has those of older versions."""
    for old, new in RENAMED.items():
        words = [re.sub(rf"^{re.escape(old)}(?=$|[.=])", new, word) for word in words]
    return list(words)


def measure(
    out: Path, config: MeasureConfig, metrics: Sequence[str], words: Sequence[str], only: Sequence[str] | None = None
) -> list[str]:
    """Metrics of every set of an evaluation; every process calls it. Returns what could not be measured, and why.

    only: names of the sets to measure, all by default.

    A metric that a set cannot have, such as 16 shots of a class of 5 images, does not stop the others.
    """
    problems: list[str] = []

    @contextmanager
    def attempted(title: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, OSError, ImportError) as error:  # raised on all processes
            if LostProcess.if_it_is(error):
                raise
            problems.append(f"{title}: {error}")

    noted = on_main(lambda: read_model(out))
    opened = {name: EmbeddedSet.open(out / "embeddings" / name) for name in noted["sets"]}

    def check() -> None:
        for embedded in opened.values():
            embedded.check()

    on_main(check)  # or damage is found hours later
    beside = splits_beside(list(opened))
    for split_set, (name, split) in beside.items():
        opened[name].splits[split] = opened[split_set]
    names = [name for name in opened if name not in beside]
    for name in only or ():
        require(name in names, "--sets", name, f"not embedded in {out}; there are {', '.join(names)}")
    for name in only or names:
        sets = [opened[name]]
        with attempted(f"{name}, without what leaked"):
            sets += without_leaked(sets[0], out)
        for embedded in [*sets] if config.centre else []:
            with attempted(f"{embedded.name}, centred"):
                folder = out / "embeddings" / f"{embedded.name}-centred"
                remedy = "--centre would overwrite it: embed it by another name"
                require(folder.name not in opened, "set", folder.name, remedy)
                sets.append(centred(embedded, folder))
        for embedded in sets:
            results = out / "results" / embedded.name
            for kind in metrics:
                with attempted(f"{embedded.name}, {kind}"):
                    _measure_one(kind, results / f"{kind}.json", embedded, config, words)
            if "retrieval" in metrics and len(embedded.pairs):
                with attempted(f"{embedded.name}, retrieved examples"):
                    on_main(partial(_write_examples, results, noted, embedded, noted["sets"][name]))
    return problems


def require_all(problems: list[str]) -> None:
    """Raise RunError if something could not be measured; the main process reports it."""
    if problems:
        kind = RunError if distributed.is_main() else FailedElsewhere
        raise kind("all else was measured, but not\n  " + "\n  ".join(problems))


def without_leaked(embedded: EmbeddedSet, out: Path) -> list[EmbeddedSet]:
    """The set without the images that tools/find_leakage.py found in the training source, if there are any."""
    found = out / "results" / embedded.name / LEAKED_KEYS
    if not (keys := on_main(lambda: read_keys(found) if found.is_file() else [])):
        return []
    rest = without(embedded, keys, out / "embeddings" / f"{embedded.name}-without-leaked")
    rest.splits = embedded.splits
    return [rest]


def _measure_one(kind: str, path: Path, embedded: EmbeddedSet, config: MeasureConfig, words: Sequence[str]) -> None:
    title = f"{embedded.name}, {kind.replace('_', ' ')}"
    measure_it, section, needs = METRICS[kind]
    there = {CAPTIONS: len(embedded.pairs) > 0, CLASSES: embedded.labels is not None}
    there[TRAINING] = "train" in embedded.splits
    if section == "information" and config.information.labels:
        needs = {CAPTIONS}
    there[FACTORS] = FACTORS in needs and split_of_scenes(embedded.metadata) is not None
    missing = sorted(need for need in needs if not there[need])
    is_centred = embedded.source.get("centred", False)
    if is_centred and TRAINING in needs:
        _print(f"{title}: left out, a centred set has no training split")
        return
    if missing:
        _print(f"{title}: left out, the set has no {' and no '.join(missing)}")
        return
    if not config.again and on_main(lambda: _measured(path) == identity(embedded)):
        _print(f"{title}: measured before ({path}); --again true measures it again")
        return
    on_main(lambda: require_writable("results", path.parent))
    _print(f"{title} …")
    started = time.monotonic()
    result = measure_it(embedded, getattr(config, section))
    seconds, command = round(time.monotonic() - started, 3), ("evaluate.py", "measure", *words)
    settings = {**result.settings, "centred": True} if is_centred else result.settings
    result = replace(result, seconds=seconds, command=command, embeddings=identity(embedded), settings=settings)
    on_main(lambda: result.save(path))


def _measured(path: Path) -> str | None:
    """Identity of the embeddings that a result is of; None where there is no result."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found.get("embeddings") if isinstance(found, dict) else None


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


def _print(line: str) -> None:
    if distributed.is_main():
        print(printable(line), flush=True)


def _write_examples(results: Path, noted: dict[str, Any], embedded: EmbeddedSet, noted_set: dict[str, str]) -> None:
    """Write retrieved images and captions for the report, unless they are newer than the retrieval; one process does.

    noted: what `embed` noted of the evaluation, noted_set: of the set. Raises ValueError or OSError where the source
    can no longer be read, or has changed.
    """
    retrieved, listed = results / "retrieval.npz", results / "examples" / "examples.json"
    if not retrieved.is_file() or (listed.is_file() and listed.stat().st_mtime_ns > retrieved.stat().st_mtime_ns):
        return
    recipe = parse_recipe_text(noted_set["recipe"])
    # Whoever made the folder wrote them.
    require_modest(recipe_to_dict(recipe) | {"model": {"vision": {"image_size": noted["image_size"]}}})
    recipe.data.allow_pipe, recipe.data.cache = False, str(own_cache(recipe.data.cache))
    source = read_set(noted_set["word"], recipe, noted["image_size"])
    if source.fingerprint != embedded.source.get("of", embedded.source.get("fingerprint")):
        raise ValueError(f"{noted_set['word']} no longer holds the embedded samples: embed it again")

    def image_of(row: int) -> Image.Image:
        return source.samples[int(embedded.indices[row])].image

    with np.load(retrieved, allow_pickle=False) as outcomes:
        write_retrieved_examples(embedded, dict(outcomes), image_of, listed.parent)
