"""What a run is: nested dataclasses that a recipe file and dotted command-line overrides fill.

`launch_scripts/*.py --help` prints every field below with its text; `modstruct/cli.py` does the parsing.
A value that cannot work is refused here, by the name of its field, before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal


def refuse(field_name: str, value: object, remedy: str) -> None:
    """Raise the one kind of error that a wrong recipe gets: field, value, remedy."""
    raise ValueError(f"{field_name} = {value!r}: {remedy}")


class RunError(RuntimeError):
    """Ends a run for a reason that its message explains."""


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        refuse(field_name, value, remedy)


def _require_counts(section: str, values: object, names: tuple[str, ...]) -> None:
    """Refuse a count below 1."""
    for name in names:
        require(getattr(values, name) >= 1, f"{section}.{name}", getattr(values, name), "at least 1")


Precision = Literal["float32", "tf32", "bf16"]
"""What the products of embeddings are formed from on a GPU: float32 numbers, or, on its tensor cores, numbers rounded
to tf32 or bfloat16; sums are float32. The CPU always takes float32."""


@dataclass
class Source:
    """One training source among several."""

    shards: str
    """Path, glob or brace pattern of tar shards, or `pipe:COMMAND` (COMMAND writes a tar to its standard output)."""
    weight: float | None = None
    """Share of the samples drawn from this source, relative to the other weights."""
    index: str | None = None
    """Folder of indexes made by tools/index_shards.py; needed for `pipe:` sources only."""

    def __post_init__(self):
        require(self.weight is None or self.weight > 0, "data.train.weight", self.weight, "give a number above 0")


@dataclass
class ScenesConfig:
    """The built-in pictures (data.train: scenes)."""

    train_samples: int = 24_000
    """Pairs in the training split."""
    validation_samples: int = 1_000
    """Pairs in the validation split."""
    test_samples: int = 1_000
    """Pairs in the test split, scenes whose factor combinations never occur in training."""
    seed: int = 0
    """Seed of the generator."""

    def __post_init__(self):
        _require_counts("data.scenes", self, ("train_samples", "validation_samples", "test_samples"))


@dataclass
class DataConfig:
    train: str | list[str] | list[Source] = "scenes"
    """Training shards: `scenes` (built in), a path / glob / brace pattern, or a list of sources with weights."""
    validation: str | None = "scenes"
    """Shards measured during training (the best checkpoint is chosen on them); null for none."""
    eval: str | None = "scenes"
    """Shards of the final table; null for none."""
    zero_shot: str | None = "scenes"
    """YAML file with `label` (a field of each sample's key.json), `templates` and `classes`; null for none."""
    cache: str = "~/.cache/modstruct"
    """Folder for what is built once: scenes, shard indexes, trained tokenizers, spooled pipes."""
    workers: int = 1
    """Loader processes beside each training process; 0 loads in the training process itself."""
    shuffle_block: int = 64
    """Samples that lie together in a shard and are read together."""
    shuffle_window: int = 1024
    """Blocks mixed with each other sample by sample; more blocks shuffle better and are read less in order."""
    allow_pipe: bool = False
    """Permit `pipe:` sources, which run a shell command."""
    pipe_cache_gib: float = 50.0
    """Disk that spooled `pipe:` shards may take in the cache, in GiB."""
    max_bad_share: float = 0.1
    """Largest share of unreadable samples that a run puts up with."""
    max_image_pixels: int = 25_000_000
    """Pixels above which an image counts as a decompression bomb; decoding takes 8 bytes of memory each, WebP 20."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """The built-in pictures."""

    def __post_init__(self):
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.shuffle_block >= 1, "data.shuffle_block", self.shuffle_block, "at least 1")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "at least 1")
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "a share from 0 to 1")
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
    """The plain and the augmented view of each picture and caption."""

    plain: Literal["center_crop", "crop_flip"] = "center_crop"
    """center_crop: shorter side resized, centre cut out; crop_flip: random crop and flip."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Range of the share of the area that a random crop keeps."""
    flip: bool = True
    """Flip random views left to right with probability 1/2."""
    auto_augment: bool = True
    """AutoAugment (ImageNet policy) on the augmented view."""
    eda_rate: float = 0.1
    """Share of a caption's words that its augmented view changes (Wei & Zou 2019)."""
    eda_synonyms: bool = False
    """Let EDA replace words by synonyms; needs nltk and its WordNet data."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour channel, 0 to 1 (CLIP's by default)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour channel."""

    def __post_init__(self):
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "views.crop_scale", self.crop_scale, "two shares with 0 < low <= high <= 1")
        require(0 <= self.eda_rate <= 1, "views.eda_rate", self.eda_rate, "a share from 0 to 1")
        require(all(s > 0 for s in self.std), "views.std", self.std, "three numbers above 0")


@dataclass
class VisionConfig:
    """Image tower by sizes (a ViT); used when model.name is null."""

    image_size: int = 64
    """Side of the square picture, in pixels."""
    patch_size: int = 8
    """Side of a patch, in pixels."""
    width: int = 192
    """Width of the transformer."""
    layers: int = 4
    """Number of transformer layers."""
    head_width: int = 32
    """Width of one attention head."""

    def __post_init__(self):
        _require_counts("model.vision", self, ("image_size", "patch_size", "width", "layers", "head_width"))
        require(
            self.image_size % self.patch_size == 0,
            "model.vision.patch_size",
            self.patch_size,
            f"a divisor of model.vision.image_size = {self.image_size}",
        )
        require(
            self.width % self.head_width == 0,
            "model.vision.head_width",
            self.head_width,
            f"a divisor of model.vision.width = {self.width}",
        )


@dataclass
class TextConfig:
    """Text tower by sizes; with model.name given only `architecture: bert` uses them."""

    architecture: Literal["clip", "bert"] = "clip"
    """clip: CLIP's causal transformer; bert: transformers' BERT, bidirectional."""
    width: int = 192
    """Width of the transformer."""
    layers: int = 3
    """Number of transformer layers."""
    heads: int = 6
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout of BERT; CLIP's transformer has none."""

    def __post_init__(self):
        _require_counts("model.text", self, ("width", "layers", "heads"))
        require(0 <= self.dropout < 1, "model.text.dropout", self.dropout, "from 0 to below 1")
        require(
            self.width % self.heads == 0,
            "model.text.heads",
            self.heads,
            f"a divisor of model.text.width = {self.width}",
        )


@dataclass
class ModelConfig:
    name: str | None = None
    """An open_clip architecture (RN50, ViT-B-32, …); null builds the towers from the sizes below."""
    pretrained: str | None = None
    """open_clip tag of pretrained weights, or a local safetensors or weights file; needs model.name."""
    embed_dim: int = 128
    """Dimension of the shared embedding; an architecture by name has its own."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image tower by sizes."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text tower by sizes."""
    independent_head: Literal["linear", "attention_pool"] = "linear"
    """Head of the independent embedding: linear on the pooled output, or (CLIP ResNets) its own attention pooling."""
    logit_scale_init: float = 2.6592600369327779
    """Initial log of the logit scale, ln(1 / tau); ln(1 / 0.07) by default."""
    logit_scale_max: float = 4.6051701859880918
    """Largest log of the logit scale; the smallest is 0."""

    def __post_init__(self):
        require(self.embed_dim >= 1, "model.embed_dim", self.embed_dim, "at least 1")
        require(
            self.name is not None or self.pretrained is None,
            "model.pretrained",
            self.pretrained,
            "needs model.name, the architecture the weights belong to",
        )
        require(
            0 <= self.logit_scale_init <= self.logit_scale_max,
            "model.logit_scale_init",
            self.logit_scale_init,
            f"from 0 to model.logit_scale_max = {self.logit_scale_max}",
        )


@dataclass
class ContrastiveConfig:
    weight: float = 1.0
    """Weight of the contrastive base; 0 turns it off."""
    in_modal: bool = False
    """false: 1/2 (V2T + T2V), plain CLIP; true: 1/4 (V2T + T2V + V2V + T2T)."""


@dataclass
class SeparationConfig:
    weight: float = 0.0
    """Weight of deep feature separation; 0 turns it and its heads off."""
    uniformity_t: float = 2.0
    """t of the Gaussian potential in the uniformity term."""

    def __post_init__(self):
        require(self.uniformity_t > 0, "losses.separation.uniformity_t", self.uniformity_t, "above 0")


@dataclass
class BridgeConfig:
    weight: float = 0.0
    """Weight of the Brownian bridge; 0 turns it off."""
    t: float | None = 0.25
    """Weight of the image in the bridge's mean; null draws it anew, uniform in [0, 1], each step."""

    def __post_init__(self):
        require(self.t is None or 0 <= self.t <= 1, "losses.bridge.t", self.t, "from 0 to 1, or null to draw it")


@dataclass
class GeometryConfig:
    weight: float = 0.0
    """Weight of geometric consistency; 0 turns it off (CyCLIP uses 0.25)."""
    augmented: bool = True
    """Add the part between plain and augmented views."""
    normalize: Literal["batch", "pairs"] = "batch"
    """batch: divide the sum over pairs by N, as CyCLIP; pairs: by N^2, so that a weight suits any batch size."""


@dataclass
class LossesConfig:
    """Final loss = sum of weight x term. A weight of 0 turns a term off, with the views and heads it alone needs."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive base."""
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    """Deep feature separation (intra-modality)."""
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    """Brownian bridge (inter-modality)."""
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    """Geometric consistency (intra- and inter-modality)."""

    def __post_init__(self):
        weights = {n: getattr(self, n).weight for n in ("contrastive", "separation", "bridge", "geometry")}
        for name, weight in weights.items():
            require(0 <= weight < inf, f"losses.{name}.weight", weight, "0 (off) or more, and finite")
        require(any(weights.values()), "losses.*.weight", weights, "at least one weight must be above 0")


@dataclass
class OptimizerConfig:
    """AdamW; no decay on norms, biases and the logit scale."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_learning_rate: float = 0.0
    """Learning rate that the cosine ends at."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self):
        require(0 < self.learning_rate < inf, "optimizer.learning_rate", self.learning_rate, "above 0 and finite")
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            "optimizer.final_learning_rate",
            self.final_learning_rate,
            f"from 0 to optimizer.learning_rate = {self.learning_rate}",
        )
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.eps < inf, "optimizer.eps", self.eps, "above 0 and finite")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.weight_decay < inf, "optimizer.weight_decay", self.weight_decay, "0 or more, and finite")
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 (no clipping) or more")


@dataclass
class TrainConfig:
    global_batch: int = 256
    """Pairs a step takes, over all processes; a multiple of the number of processes."""
    micro_batch: int | None = None
    """Pairs that a process embeds at once, if it has more: the gradient cache makes the same step of them in the memory
    of so many, for one more forward pass. null embeds all that a process has."""
    steps: int | None = None
    """Length of the run in steps; give this or train.epochs."""
    epochs: float | None = None
    """Length of the run in passes over the training source; give this or train.steps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the towers compute in; losses are always float32. fp16 needs a GPU."""
    activation_checkpointing: bool = False
    """Keep the input of each layer of the towers alone, and compute what lies inside anew for the backward pass: less
    memory for a third more work, the same gradient."""
    compile: bool = False
    """Compile the towers by torch.compile (inductor): minutes at the start, faster steps. ZeRO stages 0 to 2."""
    pairwise_precision: Precision = "tf32"
    """What the losses' products of embeddings are formed from on a GPU; sums are float32. The CPU takes float32."""
    seed: int = 0
    """Seed of the weights, the order of data, the views and every draw."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    hang_timeout_minutes: float = 30.0
    """Time after which a run on several processes ends, and names those that do not arrive: without a sign of life, or
    without a step while it trains (checkpoints and measurements may take longer). 0 waits for ever."""

    def __post_init__(self):
        require(self.global_batch >= 1, "train.global_batch", self.global_batch, "at least 1")
        fits = self.micro_batch is None or self.micro_batch >= 1
        require(fits, "train.micro_batch", self.micro_batch, "at least 1, or null")
        require(
            (self.steps is None) != (self.epochs is None),
            "train.steps",
            self.steps,
            f"give exactly one of train.steps and train.epochs (= {self.epochs!r}), null for the other",
        )
        require(self.steps is None or self.steps >= 1, "train.steps", self.steps, "at least 1")
        require(self.epochs is None or 0 < self.epochs < inf, "train.epochs", self.epochs, "above 0 and finite")
        require(self.max_skipped_steps >= 0, "train.max_skipped_steps", self.max_skipped_steps, "0 or more")
        patience = self.hang_timeout_minutes
        require(0 <= patience < inf, "train.hang_timeout_minutes", patience, "0 (never) or more, and finite")


@dataclass
class EvaluationConfig:
    every_steps: int = 0
    """Measure the validation source every so many steps; 0 at the end only."""
    batch: int = 256
    """Samples embedded at once by each process."""
    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10])
    """The K of recall at K."""
    top_k: list[int] = field(default_factory=lambda: [1, 3, 5])
    """The k of zero-shot top-k accuracy."""

    def __post_init__(self):
        require(self.every_steps >= 0, "evaluation.every_steps", self.every_steps, "0 or more")
        require(self.batch >= 1, "evaluation.batch", self.batch, "at least 1")
        for name in ("recall_at", "top_k"):
            values = getattr(self, name)
            require(bool(values) and all(k >= 1 for k in values), f"evaluation.{name}", values, "numbers of at least 1")


@dataclass
class CheckpointConfig:
    every_steps: int = 500
    """Save every so many steps (and at the end, and on SIGTERM); 0 at the end only."""
    keep_last: int = 2
    """Checkpoints kept, besides the best by validation R@1."""

    def __post_init__(self):
        require(self.every_steps >= 0, "checkpoints.every_steps", self.every_steps, "0 or more")
        require(self.keep_last >= 1, "checkpoints.keep_last", self.keep_last, "at least 1")


@dataclass
class LoggingConfig:
    every_steps: int = 10
    """Write the terms, gradient norm, throughput and memory to TensorBoard every so many steps."""
    images: int = 16
    """Text-image pairs in the example grids in TensorBoard; 0 for none."""

    def __post_init__(self):
        require(self.every_steps >= 1, "logging.every_steps", self.every_steps, "at least 1")
        require(self.images >= 0, "logging.images", self.images, "0 or more")


@dataclass
class Recipe:
    """A whole run."""

    output: str = "runs/scenes"
    """Folder for checkpoints, TensorBoard log, metrics and exported weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes ids."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The views of pictures and captions."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The two towers."""
    losses: LossesConfig = field(default_factory=LossesConfig)
    """The objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    """Length, batch, precision, seed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is written down."""
