"""All data of one run, found, checked and indexed: what the recipe's `data`, `tokenizer` and `views` sections say."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from modstruct.config import DataConfig, Recipe, Source
from modstruct.config.data import REWORDED
from modstruct.data.classification.class_files import load_classes, some_of
from modstruct.data.classification.labelled_shards import check_labels
from modstruct.data.sentencepiece_training import TRAINING_CAPTIONS
from modstruct.data.shards.evaluation_samples import EvaluationSamples, train_captions
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.samples import open_saved_samples
from modstruct.data.shards.sources import as_sources
from modstruct.data.shards.texts import TEXT_FILE, texts_of
from modstruct.data.synthetic.shards import ScenesPaths, ensure_scenes
from modstruct.data.tokenizers import Tokenizer, build_tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.distributed import is_main, main_first
from modstruct.distributed.hosts import require_same
from modstruct.errors import printable, refuse
from modstruct.files import refusing

BUILT_IN = "scenes"
Value = TypeVar("Value")
log = logging.getLogger(__name__)


@dataclass
class EvaluationData:
    """What a model is measured on, with the views and the tokenizer of its run."""

    views: Views
    tokenizer: Tokenizer
    eval: EvaluationSamples | None
    zero_shot: str | None
    """Class file."""

    def identity(self) -> dict[str, str | None]:
        """What tells these data from others, by the field that they came from."""
        classes = self.zero_shot and Path(self.zero_shot).expanduser()
        return {
            "data.eval": None if self.eval is None else self.eval.samples.content,
            "data.zero_shot": hashlib.sha256(classes.read_bytes()).hexdigest() if classes else None,
            "tokenizer": hashlib.sha256(self.tokenizer.model).hexdigest(),
        }


@dataclass
class RunData(EvaluationData):
    """The same, and what the model is trained on."""

    train: Samples
    validation: EvaluationSamples | None

    def identity(self) -> dict[str, str | None]:
        validation = None if self.validation is None else self.validation.samples.content
        trained = {"data.train": self.train.drawn, "data.validation": validation}
        return trained | super().identity()


def open_run_data(
    recipe: Recipe, image_size: int, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
) -> RunData:
    """Open every source of the recipe; every process calls it.

    image_size: side in pixels that the image tower takes. tokenizer: a checkpoint's; None builds the recipe's.
    fingerprint: of the training samples of a checkpoint, which are found again even if a few shards were lost.
    Raises ValueError naming the field that is wrong.
    """

    def build() -> RunData:
        if recipe.data.train != BUILT_IN and BUILT_IN in (recipe.data.validation, recipe.data.eval) and is_main():
            log.warning("data.validation or data.eval is `scenes` beside your own data.train: name your own, or null")
        config = _with_scenes(recipe.data, recipe, image_size)
        train = open_saved_samples(train_sources(config), config, "data.train", fingerprint, is_main())
        measured = {"data.validation": config.validation, "data.eval": config.eval}
        found = {field: _evaluation(field, source, config) for field, source in measured.items()}
        _check_labels(found, config, recipe.data.zero_shot)
        return RunData(
            views=Views(recipe.views, image_size),
            train=train,
            validation=found["data.validation"],
            eval=found["data.eval"],
            zero_shot=config.zero_shot,
            tokenizer=tokenizer or _tokenizer(recipe, train),
        )

    with refusing("data.cache", recipe.data.cache):
        data = main_first(build)
    return _same_on_all(data)


def train_sources(config: DataConfig) -> list[Source]:
    """data.train with the filters of its sources, which data.filter is unless they have their own."""
    sources = as_sources(config.train)
    return [replace(source, filter=config.filter) if source.filter is None else source for source in sources]


def open_evaluation_data(recipe: Recipe, image_size: int, tokenizer: Tokenizer) -> EvaluationData:
    """Open the sources that a checkpoint is measured on, data.eval and data.zero_shot; as open_run_data otherwise."""

    def build() -> EvaluationData:
        wanted = replace(recipe.data, train="", validation=None)  # so that no scenes are drawn for these
        if wanted.zero_shot == BUILT_IN and wanted.eval != BUILT_IN:
            wanted = replace(wanted, zero_shot=None)
        config = _with_scenes(wanted, recipe, image_size)
        samples = _evaluation("data.eval", config.eval, config)
        _check_labels({"data.eval": samples}, config, wanted.zero_shot)
        return EvaluationData(Views(recipe.views, image_size), tokenizer, samples, config.zero_shot)

    with refusing("data.cache", recipe.data.cache):
        data = main_first(build)
    return _same_on_all(data)


Data = TypeVar("Data", bound=EvaluationData)


def _same_on_all(data: Data) -> Data:
    require_same(data.identity(), "hosts must see the same files: share the folder, or copy it to each of them")
    return data


def _check_labels(measured: dict[str, EvaluationSamples | None], config: DataConfig, named: str | None) -> None:
    """Refuse a class file that does not fit the sources, on the main process. named: the file in the recipe."""
    if config.zero_shot is None or not is_main():
        return
    classes = load_classes(config.zero_shot)
    found = {field: of for field, of in measured.items() if of is not None}
    thorough = named != BUILT_IN  # its classes are a default, which other data need not have
    texts = [check_labels(classes, of.samples, config, field, thorough) for field, of in found.items()]
    missing = [text for text in texts if text is not None]
    if thorough and missing and len(missing) == len(found):
        refuse("data.zero_shot", named, f"{'; '.join(missing)}; correct `label` in the file, or give null")
    if thorough and not found:
        missing = [f"data.zero_shot = {named!r}, and {' and '.join(measured)} are null"]
    for text in missing:
        log.warning("zero-shot classification is left out: %s", text)


def _evaluation(field: str, source: str | None, config: DataConfig) -> EvaluationSamples | None:
    return None if source is None else EvaluationSamples(as_sources(source), config, field, is_main())


def check_text_field(samples: Samples, recipe: Recipe) -> None:
    """Refuse training sources without the field of KEY.json that augmented captions come from; name a few lacking ones.

    Raises ValueError, naming views.text, where more than data.max_bad_share of the samples of a source that are looked
    at have no such text.
    """
    field = recipe.views.text_field
    for looked in [] if field is None else _look_for(field, samples, recipe):
        if len(looked.lacking) > recipe.data.max_bad_share * looked.count:
            remedy = f"{looked} ({_where_texts_are(looked.others)}): give eda, or field:NAME of one that has"
            refuse("views.text", recipe.views.text, remedy)
        if looked.lacking and is_main():
            log.warning("views.text: %s (first %s): others will replace them", looked, looked.lacking[0])


def check_caption_fields(samples: Samples, recipe: Recipe) -> None:
    """Refuse, naming data.caption_fields, one that no sample has that is looked at; say where KEY.txt will stand in."""
    for field in _drawn_fields(recipe):
        looks = [] if field == TEXT_FILE else _look_for(field, samples, recipe)
        if looks and all(len(looked.lacking) == looked.count for looked in looks):
            others = {name: None for looked in looks for name in looked.others}
            remedy = f"no sample that was looked at has a text in {field!r} of KEY.json ({_where_texts_are(others)})"
            refuse("data.caption_fields", recipe.data.caption_fields, f"{remedy}: correct the name, or leave it out")
        for looked in looks:
            if looked.lacking and is_main():
                log.warning("data.caption_fields: %s (first %s): KEY.txt stands in", looked, looked.lacking[0])


def _drawn_fields(recipe: Recipe) -> list[str]:
    return [field for field, weight in (recipe.data.caption_fields or {}).items() if weight]


@dataclass
class _Looked:
    """At some samples of a source, for a field of KEY.json."""

    field: str
    shards: str
    count: int
    lacking: list[str]
    """Places of those that have no text there."""
    others: dict[str, None]
    """Fields that hold their texts."""

    def __str__(self) -> str:
        looked = f"samples looked at in {self.shards} have no text in {self.field!r} of KEY.json"
        return f"{len(self.lacking)} of {self.count} {looked}"


def _look_for(field: str, samples: Samples, recipe: Recipe) -> list[_Looked]:
    reader, looks = ShardReader(samples, recipe.data), []
    for source, rows in zip(as_sources(recipe.data.train), samples.source_rows(), strict=True):
        numbers = rows.looked_at().tolist()
        looked = _Looked(field, source.shards, len(numbers), [], {})
        for sample, metadata in reader.each(reader.metadata, numbers):  # bad ones count where they are read with images
            if not texts_of(metadata, field):
                looked.lacking.append(samples.place(sample))
                looked.others |= dict.fromkeys(name for name in metadata if texts_of(metadata, name))
        looks.append(looked)
    return looks


def _where_texts_are(fields: Iterable[str]) -> str:
    return f"texts are in {some_of(map(printable, fields))}" if fields else "no field holds a text"


def scenes_of(recipe: Recipe, image_size: int) -> ScenesPaths:
    """The built-in files as the recipe wants them, written first if need be."""
    rewords = recipe.views.text_field == REWORDED
    return ensure_scenes(recipe.data.scenes, recipe.data.cache, image_size, rewords)


def _with_scenes(config: DataConfig, recipe: Recipe, image_size: int) -> DataConfig:
    """The same with every `scenes` replaced by the built-in files, written first if need be."""
    if BUILT_IN not in (config.train, config.validation, config.eval, config.zero_shot):
        return config
    scenes = scenes_of(recipe, image_size)

    def found(value: Value, file: str) -> Value | str:
        return file if value == BUILT_IN else value

    return replace(
        config,
        train=found(config.train, scenes.train),
        validation=found(config.validation, scenes.validation),
        eval=found(config.eval, scenes.test),
        zero_shot=found(config.zero_shot, scenes.zero_shot),
    )


def _tokenizer(recipe: Recipe, train: Samples) -> Tokenizer:
    def captions():
        return train_captions(train, recipe.data, TRAINING_CAPTIONS)

    fields = sorted(_drawn_fields(recipe))
    content = f"{train.content} fields {fields}" if fields else train.content
    return build_tokenizer(recipe.tokenizer, captions, recipe.data.cache, content)
