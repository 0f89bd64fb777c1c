"""All data of one run, found, checked and indexed: what the recipe's `data`, `tokenizer` and `views` sections say."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from modstruct.config import DataConfig, Recipe
from modstruct.data.sentencepiece_training import TRAINING_CAPTIONS
from modstruct.data.shards.evaluation_samples import EvaluationSamples, train_captions
from modstruct.data.shards.samples import Samples, open_samples, open_saved_samples
from modstruct.data.shards.sources import as_sources
from modstruct.data.synthetic.shards import ensure_scenes
from modstruct.data.tokenizers import Tokenizer, build_tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.distributed import is_main, main_first
from modstruct.distributed.hosts import require_same

BUILT_IN = "scenes"
log = logging.getLogger(__name__)


@dataclass
class RunData:
    """Sources, views and tokenizer of a run."""

    views: Views
    train: Samples | None
    validation: EvaluationSamples | None
    eval: EvaluationSamples | None
    zero_shot: str | None
    """Class file."""
    tokenizer: Tokenizer

    def identity(self) -> dict[str, str | None]:
        """What tells these data from others, by the field that they came from."""
        measured = {"data.validation": self.validation, "data.eval": self.eval}
        found = {"data.train": None if self.train is None else f"{self.train.fingerprint} {self.train.weights}"}
        found |= {name: None if source is None else source.samples.fingerprint for name, source in measured.items()}
        classes = self.zero_shot and Path(self.zero_shot).expanduser()
        found["data.zero_shot"] = hashlib.sha256(classes.read_bytes()).hexdigest() if classes else None
        return found | {"tokenizer": hashlib.sha256(self.tokenizer.model).hexdigest()}


def open_run_data(
    recipe: Recipe,
    image_size: int,
    tokenizer: Tokenizer | None = None,
    training: bool = True,
    fingerprint: str | None = None,
) -> RunData:
    """Open every source of the recipe; every process calls it.

    image_size: side in pixels that the image tower takes. tokenizer: a checkpoint's; None builds the recipe's.
    training: False leaves out data.train and data.validation. fingerprint: of the training samples of a checkpoint,
    which are then found again even if a few shards were lost. Raises ValueError naming the field that is wrong.
    """

    def build() -> RunData:
        wanted = recipe.data
        if not training:  # what is not read need not be drawn
            wanted = replace(wanted, train="", validation=None)
            if wanted.zero_shot == BUILT_IN and wanted.eval != BUILT_IN:
                wanted = replace(wanted, zero_shot=None)
        elif wanted.train != BUILT_IN and BUILT_IN in (wanted.validation, wanted.eval) and is_main():
            log.warning("data.validation or data.eval is `scenes` beside your own data.train: name your own, or null")
        config = _with_scenes(wanted, image_size)
        say = is_main()
        train = _training_samples(config, say, fingerprint) if training else None

        def evaluation(name: str, source: str | None) -> EvaluationSamples | None:
            return None if source is None else EvaluationSamples(as_sources(source), config, name, say)

        return RunData(
            views=Views(recipe.views, image_size),
            train=train,
            validation=evaluation("data.validation", config.validation) if training else None,
            eval=evaluation("data.eval", config.eval),
            zero_shot=config.zero_shot,
            tokenizer=tokenizer or _tokenizer(recipe, train),
        )

    data = main_first(build)
    require_same(data.identity(), "hosts must see the same files: share the folder, or copy it to each of them")
    return data


def _training_samples(config: DataConfig, say: bool, fingerprint: str | None) -> Samples:
    sources = as_sources(config.train)
    if fingerprint is None:
        return open_samples(sources, config, "data.train", say)
    return open_saved_samples(sources, config, "data.train", fingerprint, say)


def _with_scenes(config: DataConfig, image_size: int) -> DataConfig:
    """The same with every `scenes` replaced by the built-in files, written first if need be."""
    if BUILT_IN not in (config.train, config.validation, config.eval, config.zero_shot):
        return config
    scenes = ensure_scenes(config.scenes, config.cache, image_size)
    files = {
        "train": scenes.train,
        "validation": scenes.validation,
        "eval": scenes.test,
        "zero_shot": scenes.zero_shot,
    }
    return replace(config, **{name: file for name, file in files.items() if getattr(config, name) == BUILT_IN})


def _tokenizer(recipe: Recipe, train: Samples) -> Tokenizer:
    def captions():
        return train_captions(train, recipe.data, TRAINING_CAPTIONS)

    return build_tokenizer(recipe.tokenizer, captions, recipe.data.cache, train.fingerprint)
