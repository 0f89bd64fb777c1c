"""What is read: sources, tokenizer, views."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from modstruct.errors import require, require_counts

REWORDED, FIELD = "reworded", "field:"
"""Of views.text; the first is also the field that the built-in scenes have."""


@dataclass
class Source:
    """One training source among several."""

    shards: str
    """Path, glob, brace pattern or address (s3://, gs://, https://) of tar shards, or `pipe:COMMAND` (COMMAND writes a
    tar to its standard output)."""
    weight: float | list[float] | None = None
    """Fraction of the samples drawn from this source, relative to the other weights; a list has the weights of the
    epochs 0, 1, …, of which the last holds on, and may be 0 where the source is not drawn."""
    filter: str | None = None
    """As data.filter, for this source; null: as that, "": all samples."""
    max_repeats: float | None = None
    """How often an epoch draws each sample of this source at most, on average; epochs are as much shorter. null: as
    often as its weight has it."""
    name: str | None = None
    """In TensorBoard; null: source_0, source_1, …"""
    index: str | None = None
    """Folder of indexes made by tools/index_shards.py; needed for `pipe:` sources only."""
    caption_lines: bool | Literal["auto"] | None = None
    """As data.caption_lines, for this source; null: as that."""

    def __post_init__(self):
        weights = self.weight if isinstance(self.weight, list) else [1.0 if self.weight is None else self.weight]
        fits = all(0 <= weight < math.inf for weight in weights) and any(weights)
        require(fits, "data.train.weight", self.weight, "give a finite number above 0, or a list of which one is")
        if self.max_repeats is not None:
            require(self.max_repeats > 0, "data.train.max_repeats", self.max_repeats, "above 0")
            require(
                self.weight is not None, "data.train.max_repeats", self.max_repeats, "give the sources weights, too"
            )


LIKE_SOURCES = re.compile(r"""\s*[\[{].*\bshards["']?\s*:""", re.DOTALL)


@dataclass
class ScenesConfig:
    """The built-in images (data.train: scenes)."""

    train_samples: int = 24_000
    """Pairs in the training split."""
    validation_samples: int = 1_000
    """Pairs in the validation split."""
    test_samples: int = 1_000
    """Pairs in the test split, scenes whose factor combinations never occur in training."""
    seed: int = 0
    """Seed of the generator."""
    told: float = 1.0
    """How much captions tell, 0 to 1: each shape, colour, size, fill, place and ground that a caption names is named
    with this probability times that at 1. Scenes, images, moods, asides and templates stay the same."""

    def __post_init__(self):
        require_counts("data.scenes", self, ("train_samples", "validation_samples", "test_samples"))
        require(0 <= self.told <= 1, "data.scenes.told", self.told, "a fraction from 0 to 1")


@dataclass
class DataConfig:
    train: str | list[str] | list[Source] = "scenes"
    """Training shards: `scenes` (built in), a path / glob / brace pattern / address, or a list of sources with
    weights."""
    validation: str | None = "scenes"
    """Shards measured during training (the best checkpoint is chosen on them); null for none."""
    eval: str | None = "scenes"
    """Shards of the final table; null for none."""
    zero_shot: str | None = "scenes"
    """YAML file with `label` (a field of each sample's key.json), `templates` and `classes`; null for none."""
    cache: str = "~/.cache/modstruct"
    """Folder for what is built once: scenes, shard indexes, trained tokenizers, spooled pipes."""
    filter: str | None = None
    """Of the training samples those of which img2dataset's parquet beside the shards (00000.parquet beside 00000.tar)
    says so: `similarity > 0.3 and width >= 128`. Comparisons of columns with numbers and texts, and, or, not, in [...].
    Needs pyarrow: pip install 'modstruct[parquet]'."""
    caption_fields: dict[str, float] | None = None
    """Captions of training by weight, drawn for each sample and epoch: {txt: 0.5, blip: 0.5} takes KEY.txt or the text
    (or one of a list of texts) under `blip` in KEY.json. A sample without a text there takes KEY.txt, and is counted.
    null: KEY.txt alone."""
    caption_lines: bool | Literal["auto"] = "auto"
    """Each line of KEY.txt is a caption: evaluation takes all, training draws one an epoch. auto: where nearly every
    KEY.txt has several lines, and no KEY.json holds one as a whole, as img2dataset's do."""
    workers: int = 1
    """Loader processes beside each training process; 0 loads in the training process itself."""
    shuffle_block: int = 64
    """Samples that lie together in a shard and are read together."""
    shuffle_window: int = 1024
    """Blocks mixed with each other sample by sample; more blocks shuffle better and are read less in order."""
    read_ahead_mib: int = 64
    """Memory of each loader process for samples that are read ahead of decoding, 32 reads at once. Neighbours needed
    soon are fetched by one read: where half of it holds shuffle_window blocks, blocks are read whole."""
    groups: int = 1
    """Parts of every global batch that read shards of their own; processes take whole groups, so any number of
    processes that divides it reads the same batches, and each host its own shards only. Needs order_version 2."""
    order_version: Literal[1, 2] = 1
    """1: the order keeps 24 bytes a block of samples in every process; 2: another order, computed, for data.groups and
    for billions of samples. Blocks of whole shards are then read in turn, a window of them at a time."""
    allow_pipe: bool = False
    """Permit `pipe:` sources, which run a shell command."""
    pipe_cache_gib: float = 50.0
    """Disk that spooled `pipe:` shards may take in the cache, in GiB."""
    max_bad_share: float = 0.1
    """Tolerated fraction of unreadable samples."""
    max_image_pixels: int = 25_000_000
    """Pixels above which an image counts as a decompression bomb; decoding takes 8 bytes of memory each, WebP 20."""
    scaled_decoding: bool = True
    """Decode a training JPEG at 1/2, 1/4 or 1/8 of its size where the crops of its views stay as large as a view."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """The built-in images."""

    def __post_init__(self):
        # What is no list of sources for an unknown field would else be a pattern.
        listed = isinstance(self.train, str) and LIKE_SOURCES.match(self.train)
        remedy = f"is no list of sources, whose fields are {', '.join(field.name for field in fields(Source))}"
        require(not listed, "data.train", self.train, remedy)
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.shuffle_block >= 1, "data.shuffle_block", self.shuffle_block, "at least 1")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "at least 1")
        require(self.read_ahead_mib >= 1, "data.read_ahead_mib", self.read_ahead_mib, "at least 1")
        require(self.groups >= 1, "data.groups", self.groups, "at least 1")
        if self.order_version == 1:
            require(self.groups == 1, "data.groups", self.groups, "more than 1 needs data.order_version: 2")
        drawn = self.caption_fields
        fits = drawn is None or (all(0 <= weight < math.inf for weight in drawn.values()) and any(drawn.values()))
        require(
            fits, "data.caption_fields", drawn, "give each field a weight of 0 or more, and one of them more than 0"
        )
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "a fraction from 0 to 1")
        require(self.max_image_pixels >= 1, "data.max_image_pixels", self.max_image_pixels, "at least 1")
        require(self.pipe_cache_gib > 0, "data.pipe_cache_gib", self.pipe_cache_gib, "above 0")


@dataclass
class TokenizerConfig:
    kind: Literal["sentencepiece", "clip_bpe", "bert_wordpiece"] = "sentencepiece"
    """sentencepiece: a model file, or trained on the captions at first use; clip_bpe: CLIP's own; bert_wordpiece: a
    vocabulary file."""
    path: str | None = None
    """sentencepiece model file (null: train one on data.train) or BERT vocabulary file (vocab.txt)."""
    vocab_size: int = 1024
    """Size of the vocabulary that a sentencepiece tokenizer is trained to; the other kinds have their own."""
    context_length: int = 32
    """Tokens a caption is cut or padded to, start and end tokens included."""

    def __post_init__(self):
        require(self.context_length >= 3, "tokenizer.context_length", self.context_length, "at least 3")
        require(self.vocab_size >= 64, "tokenizer.vocab_size", self.vocab_size, "at least 64")
        if self.kind == "bert_wordpiece":
            require(self.path is not None, "tokenizer.path", self.path, "give BERT's vocab.txt for bert_wordpiece")


@dataclass
class ViewsConfig:
    """The plain and the augmented view of each image and caption."""

    on: Literal["loader", "device"] = "loader"
    """Where the image views of pre-training are made: by the loader, which sends them, or on the device (GPU), from the
    decoded pixels and the draws that the loader sends. Equal bit for bit, but of images at least twice a view's size
    that the loader does not decode so much smaller: PNG, WebP, JPEG beyond 1/8 or without `data.scaled_decoding`."""
    plain: Literal["center_crop", "crop_flip"] = "center_crop"
    """center_crop: shorter side resized, centre cut out; crop_flip: random crop and flip."""
    evaluation: Literal["center_crop", "squeeze"] = "center_crop"
    """What evaluation sees: center_crop, or squeeze: the whole image made square, as ALBEF does it."""
    rand_augment: bool = False
    """RandAugment on crop_flip views (Cubuk et al. 2020): two of ALBEF's ten operations, magnitude 7 of 10."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Range of the fraction of the area that a random crop keeps."""
    flip: bool = True
    """Flip random views left to right with probability 1/2."""
    auto_augment: bool = True
    """AutoAugment (ImageNet policy) on the augmented view."""
    text: str = "eda"
    """Augmented captions. eda: words changed at random (eda_rate); field:NAME: the text that KEY.json has under NAME,
    or one of a list of texts, drawn anew each epoch; reworded: as field:reworded, which the built-in scenes have. Where
    a method uses them, a sample without such a text is bad: another one replaces it, counted and named."""
    eda_rate: float = 0.1
    """Fraction of a caption's words that EDA changes (Wei & Zou 2019); unused where views.text is not eda."""
    eda_synonyms: bool = False
    """Let EDA replace words by synonyms; needs nltk and its WordNet data."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour channel, 0 to 1 (CLIP's by default)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour channel."""

    def __post_init__(self):
        known = self.text in ("eda", REWORDED) or (self.text.startswith(FIELD) and self.text.strip() != FIELD)
        require(known, "views.text", self.text, "eda, reworded, or field:NAME with a field of KEY.json")
        fits = not self.rand_augment or self.plain == "crop_flip"
        require(fits, "views.rand_augment", self.rand_augment, "needs views.plain: crop_flip")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "views.crop_scale", self.crop_scale, "two shares with 0 < low <= high <= 1")
        require(0 <= self.eda_rate <= 1, "views.eda_rate", self.eda_rate, "a fraction from 0 to 1")
        require(all(s > 0 for s in self.std), "views.std", self.std, "three numbers above 0")

    @property
    def text_field(self) -> str | None:
        """The field of KEY.json that augmented captions come from; None for EDA."""
        return None if self.text == "eda" else self.text.removeprefix(FIELD)
