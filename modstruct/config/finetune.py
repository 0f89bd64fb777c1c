"""A fine-tuning run: a downstream task of the fusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from modstruct.config.data import ScenesConfig, TokenizerConfig, ViewsConfig
from modstruct.config.fusion import FusionConfig
from modstruct.config.losses import LossesConfig, MatchingConfig, QueueContrastConfig
from modstruct.config.migrations import SCHEMA
from modstruct.config.training import CheckpointConfig, LoggingConfig, OptimizerConfig, RerankBy, TrainConfig
from modstruct.errors import require, require_counts

TaskName = Literal["vqa", "nlvr2", "text_assignment", "snli_ve", "retrieval"]


@dataclass
class TaskFiles:
    """Files of one split as they are published; a task reads those of its format."""

    images: str | None = None
    """Folder of the images."""
    questions: str | None = None
    """vqa: v2_OpenEnded_mscoco_…_questions.json, or ALBEF's vqa_….json, which has the answers, too."""
    annotations: str | None = None
    """vqa: v2_mscoco_…_annotations.json; null where the answers are not public."""
    statements: str | None = None
    """nlvr2: train.json, dev.json, test1.json, or ALBEF's nlvr_….json."""
    hypotheses: str | None = None
    """snli_ve: snli_ve_train.jsonl and its like, or ALBEF's ve_….json."""
    captions: str | None = None
    """retrieval and text_assignment: Karpathy's dataset_coco.json or dataset_flickr30k.json, or ALBEF's list of a
    split."""


@dataclass
class TaskDataConfig:
    source: Literal["scenes", "files"] = "scenes"
    """scenes: the built-in task; files: those below."""
    train: TaskFiles = field(default_factory=TaskFiles)
    """Training split."""
    validation: TaskFiles = field(default_factory=TaskFiles)
    """Split measured during training (the best checkpoint is chosen on it); without files, none is."""
    test: TaskFiles = field(default_factory=TaskFiles)
    """Split of the final table; without files, none is."""
    answers: str | None = None
    """vqa: JSON list of the answers that evaluation ranks (ALBEF's answer_list.json); null takes the most frequent of
    the training split."""
    leave_out_missing: bool = False
    """Go without entries whose image is not there, instead of refusing to start."""
    cache: str = "~/.cache/modstruct"
    """Folder for what is built once."""
    workers: int = 1
    """Loader processes beside each training process; 0 loads in the training process itself."""
    max_bad_share: float = 0.1
    """Tolerated fraction of unreadable images."""
    max_image_pixels: int = 25_000_000
    """Pixels above which an image counts as a decompression bomb; decoding takes 8 bytes of memory each, WebP 20."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """The built-in task; its seed counts."""

    def __post_init__(self):
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "a fraction from 0 to 1")
        require(self.max_image_pixels >= 1, "data.max_image_pixels", self.max_image_pixels, "at least 1")


@dataclass
class TaskConfig:
    name: TaskName = "vqa"
    """The downstream task."""
    momentum: float = 0.995
    """Fraction of itself that an EMA weight keeps at an optimizer step (retrieval: fusion.momentum)."""
    alpha: float = 0.4
    """Weight of the EMA model's softened targets; 0 leaves them out (retrieval: losses.queue_contrast.alpha)."""
    ramp_steps: int | None = None
    """Steps over which alpha rises from 0; null takes the first epoch, as ALBEF (retrieval: as alpha)."""
    answer_context: int = 8
    """vqa: tokens an answer is cut or padded to, start and end included."""
    decoder_layers: int | None = None
    """vqa: layers of the answer decoder; null takes as many as the fusion encoder has."""
    answering: Literal["rank", "generate"] = "rank"
    """vqa: rank the answer list, or write the answer token by token (greedily)."""
    first_token_candidates: int = 128
    """vqa, rank: answers kept by their first token's probability, which are then ranked by their whole likelihood."""
    rerank: int = 16
    """retrieval: the best of the contrast that matching reranks (ALBEF: 128 for Flickr30K, 256 for COCO)."""
    rerank_by: RerankBy = "both"
    """retrieval: both: contrast and matching together; matching: its logit alone, as ALBEF."""

    def __post_init__(self):
        require(0 <= self.momentum < 1, "task.momentum", self.momentum, "from 0 to below 1")
        require(0 <= self.alpha <= 1, "task.alpha", self.alpha, "a fraction from 0 to 1")
        fits = self.ramp_steps is None or self.ramp_steps >= 0
        require(fits, "task.ramp_steps", self.ramp_steps, "0 or more, or null")
        require(self.answer_context >= 3, "task.answer_context", self.answer_context, "at least 3")
        require_counts("task", self, ("first_token_candidates", "rerank"))
        fits = self.decoder_layers is None or self.decoder_layers >= 1
        require(fits, "task.decoder_layers", self.decoder_layers, "at least 1, or null")


@dataclass
class TaskEvaluationConfig:
    every_steps: int = 0
    """Measure the validation split every so many steps; 0 at the end only."""
    batch: int = 128
    """Entries answered at once by each process."""
    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10])
    """retrieval: the K of recall at K."""

    def __post_init__(self):
        require(self.every_steps >= 0, "evaluation.every_steps", self.every_steps, "0 or more")
        require(self.batch >= 1, "evaluation.batch", self.batch, "at least 1")
        fits = bool(self.recall_at) and all(k >= 1 for k in self.recall_at)
        require(fits, "evaluation.recall_at", self.recall_at, "numbers of at least 1")


def _retrieval_losses() -> LossesConfig:
    return LossesConfig(
        queue_contrast=QueueContrastConfig(weight=1.0, positives="image"),
        matching=MatchingConfig(weight=1.0),
    )


@dataclass
class FinetuneRecipe:
    """A whole fine-tuning run."""

    schema: int = SCHEMA
    """Version of the recipe's fields; a file without it is of version 1."""
    output: str = "runs/vqa"
    """Folder for checkpoints, TensorBoard log, metrics, predictions and exported weights."""
    init: str | None = None
    """Pre-trained weights: a run, checkpoint or export of ours, or ALBEF's published .pth. null starts from nothing."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is learned."""
    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    """What is read."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes ids, where init is no checkpoint of ours, which has its own."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The views of images."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """The model; sizes come from init where that is a checkpoint of ours."""
    losses: LossesConfig = field(default_factory=_retrieval_losses)
    """retrieval: the objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    """Length, batch, precision, seed."""
    evaluation: TaskEvaluationConfig = field(default_factory=TaskEvaluationConfig)
    """What is measured."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is written down."""

    def __post_init__(self):
        require(self.schema == SCHEMA, "schema", self.schema, f"recipes of this version say {SCHEMA}")
        init = self.fusion.init
        require(init is None, "fusion.init", init, "fine-tuning starts from --init: null")
        self.losses.require_any()
        in_modal, remedy = self.losses.queue_contrast.in_modal, "fine-tuning reads one view of image and caption: false"
        require(not in_modal, "losses.queue_contrast.in_modal", in_modal, remedy)
        on, remedy = self.views.on, "fine-tuning makes its views in the loader: loader"
        require(on == "loader", "views.on", on, remedy)
        micro = self.train.micro_batch
        require(micro is None, "train.micro_batch", micro, "fine-tuning takes its batch whole: null")
        dropped, remedy = self.train.patch_dropout, "the fusion encoder looks at all patches; give 0"
        require(dropped == 0, "train.patch_dropout", dropped, remedy)
        decay, remedy = self.train.ema_decay, "fine-tuning has task.momentum where task.alpha is above 0; give null"
        require(decay is None, "train.ema_decay", decay, remedy)
        shown, remedy = self.logging.projector, "fine-tuning shows no embeddings; give 0"
        require(shown == 0, "logging.projector", shown, remedy)
