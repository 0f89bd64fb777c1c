"""How a run learns, what it measures, keeps and writes down."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from modstruct.config.losses import Precision
from modstruct.errors import require

RerankBy = Literal["both", "matching"]


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
    initial_learning_rate: float = 0.0
    """Learning rate that the warm-up starts from."""
    final_learning_rate: float = 0.0
    """Learning rate that the cosine ends at."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    layer_decay: float = 1.0
    """What the learning rate of a layer of a tower is multiplied by for each layer that lies after it: for starting
    from pretrained weights, 0.65 to 0.9; 1 gives all the same."""
    new_first_steps: int = 0
    """Starting from pretrained weights: in so many first steps only those weights learn that these did not bring (new
    heads, learnt numbers of losses, a new text tower); then the rate of the others rises to the schedule's over
    warmup_steps. 0: all learn from the first step."""
    new_first_scale: bool = True
    """The logit scale learns in these steps too."""

    def __post_init__(self):
        require(0 < self.learning_rate < inf, "optimizer.learning_rate", self.learning_rate, "above 0 and finite")
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            "optimizer.final_learning_rate",
            self.final_learning_rate,
            f"from 0 to optimizer.learning_rate = {self.learning_rate}",
        )
        require(
            0 <= self.initial_learning_rate <= self.learning_rate,
            "optimizer.initial_learning_rate",
            self.initial_learning_rate,
            f"from 0 to optimizer.learning_rate = {self.learning_rate}",
        )
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.eps < inf, "optimizer.eps", self.eps, "above 0 and finite")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.weight_decay < inf, "optimizer.weight_decay", self.weight_decay, "0 or more, and finite")
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay", self.layer_decay, "above 0 and at most 1")
        require(self.new_first_steps >= 0, "optimizer.new_first_steps", self.new_first_steps, "0 or more")
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 (no clipping) or more")


@dataclass
class TrainConfig:
    global_batch: int = 256
    """Pairs a step takes, over all processes; a multiple of the number of processes."""
    micro_batch: int | None = None
    """Pairs that a process embeds at once, if it has more: the gradient cache makes the same step of them in the memory
    of so many, for one more forward pass. null embeds all that a process has."""
    gradient_sums: Literal["sharded", "whole"] = "sharded"
    """How the gradient cache sums its micro-batches' gradients at ZeRO stages 2 and 3, in float32. sharded: a process
    keeps its share of the sums (4 bytes a parameter / processes), and sends the gradients of every micro-batch, while
    its backward pass runs. whole, as stages 0 and 1 have it: a process keeps all (6 bytes a parameter in half
    precision, 4 in fp32), and sends them once a step. The first pays where the memory is needed, or a micro-batch
    computes for longer than its gradients travel; the second on slow networks and with many small micro-batches."""
    steps: int | None = None
    """Length of the run in steps; give this or train.epochs."""
    epochs: float | None = None
    """Length of the run in passes over the training source; give this or train.steps."""
    precision: Literal["fp32", "bf16_mixed", "bf16", "fp16"] = "fp32"
    """What the towers compute in; losses are always float32. bf16_mixed: float32 weights and gradients, products in
    bfloat16 by autocast. bf16, fp16: the working copies of weights too, which halves what a process holds and sends.
    fp16 needs a GPU."""
    float32_norms: bool = True
    """bf16: parameters of norms, the logit scale and other learnt numbers stay float32 (bf16_mixed has all so)."""
    tf32: bool | None = False
    """Products and convolutions of float32 towers in TF32 on a GPU: 10 bits behind the point instead of 23, several
    times as fast. null leaves it to torch, which takes TF32 for convolutions alone."""
    ema_decay: float | None = None
    """Two towers: fraction of itself that an EMA of the float32 weights keeps at an optimizer step, such as 0.999; it
    is held in shares like them, and saved. evaluation.ema measures and exports it. null for none."""
    patch_dropout: float = 0.0
    """Two towers: share of an image's patches that a ViT leaves out in training, drawn anew for each image and view (Li
    et al. 2023, "Scaling Language-Image Pre-training via Masking"); it computes and keeps so much less."""
    unmasked_share: float = 0.0
    """Share of the steps, those at the end of the run, that take all patches in spite of train.patch_dropout."""
    activation_checkpointing: bool = False
    """Keep the input of each layer of the towers alone, and recompute what lies inside in the backward pass: less
    memory for a third more work, the same gradient."""
    compile: bool = False
    """Compile the towers by torch.compile (inductor): a wait at the start, faster steps. ZeRO stages 0 to 2."""
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
        for name in ("patch_dropout", "unmasked_share"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "from 0 to below 1")
        fits = self.ema_decay is None or 0 <= self.ema_decay < 1
        require(fits, "train.ema_decay", self.ema_decay, "from 0 to below 1, or null")
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
    rerank: int = 0
    """Fusion model: so many of the best by contrast are reranked by matching (ALBEF: 128, 256); 0 for none."""
    ema: bool = False
    """Measure and export the EMA of the weights: of train.ema_decay, or a fusion model's momentum encoders. Statistics
    of BatchNorm are the trained model's."""
    rerank_by: RerankBy = "both"
    """both: contrast and matching together; matching: its logit alone, as ALBEF."""

    def __post_init__(self):
        require(self.every_steps >= 0, "evaluation.every_steps", self.every_steps, "0 or more")
        require(self.batch >= 1, "evaluation.batch", self.batch, "at least 1")
        require(self.rerank >= 0, "evaluation.rerank", self.rerank, "0 (none) or more")
        for name in ("recall_at", "top_k"):
            values = getattr(self, name)
            require(bool(values) and all(k >= 1 for k in values), f"evaluation.{name}", values, "numbers of at least 1")


@dataclass
class CheckpointConfig:
    every_steps: int = 500
    """Save every so many steps (and at the end, and on SIGTERM); 0 at the end only."""
    keep_last: int = 2
    """Checkpoints kept, besides the best by validation (R@1, or a task's accuracy)."""
    asynchronous: bool = True
    """Training goes on once what a process keeps is copied into its host's memory, and a thread writes it; false waits
    for the disk. The last checkpoint, and one that is validated, are waited for."""

    def __post_init__(self):
        require(self.every_steps >= 0, "checkpoints.every_steps", self.every_steps, "0 or more")
        require(self.keep_last >= 1, "checkpoints.keep_last", self.keep_last, "at least 1")


@dataclass
class LoggingConfig:
    every_steps: int = 10
    """Write the terms, gradient norm, throughput and memory to TensorBoard every so many steps."""
    images: int = 16
    """Text-image pairs in the example grids in TensorBoard; 0 for none."""
    projector: int = 0
    """Images of data.eval, each with a caption, whose embeddings TensorBoard's projector shows at the end of
    pre-training; 0 for none."""
    wandb: str | None = None
    """Project of Weights & Biases that is given what TensorBoard is, under the same names, if the package is installed;
    null for none."""

    def __post_init__(self):
        require(self.every_steps >= 1, "logging.every_steps", self.every_steps, "at least 1")
        require(self.images >= 0, "logging.images", self.images, "0 or more")
        require(self.projector >= 0, "logging.projector", self.projector, "0 (none) or more")


@dataclass
class EmbeddingConfig:
    """What `evaluate.py embed` makes of each set, and how."""

    arrays: list[str] = field(default_factory=lambda: ["image", "text"])
    """What is written of each image and text: image and text (the shared embeddings); image_features, text_features
    (before the projection); image_projected, text_projected (after it, before normalisation); image_independent,
    text_independent (of the independent heads); image_augmented (of one augmented view an image). `all`: what the
    model has."""
    dtype: Literal["float16", "float32"] = "float16"
    """Kind of number written. float16 takes half the disk and the time to read it; of a unit vector of 512 numbers it
    moves an inner product by 1.5e-5 (root mean square, measured), which changes the order of near ties alone."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the model computes in, by autocast. fp16 needs a GPU."""
    batch: int = 256
    """Images or texts embedded at once by each process."""
    part_batches: int = 16
    """Batches of a part: so much is lost at most, of each process, when it is stopped."""
    workers: int = 1
    """Loader processes beside each process; 0 loads in the process itself."""
    max_bad_share: float = 0.1
    """Tolerated fraction of unreadable images of a set."""
    seed: int = 0
    """Seed of the augmented views, beside each image's number."""
    overwrite: bool = False
    """Start again where a set is there, finished or interrupted."""

    def __post_init__(self):
        require(bool(self.arrays), "embedding.arrays", self.arrays, "at least one name, such as image")
        for name in ("batch", "part_batches"):
            require(getattr(self, name) >= 1, f"embedding.{name}", getattr(self, name), "at least 1")
        require(self.workers >= 0, "embedding.workers", self.workers, "0 or more")
        require(0 <= self.max_bad_share <= 1, "embedding.max_bad_share", self.max_bad_share, "a fraction from 0 to 1")
        require(0 <= self.seed < inf, "embedding.seed", self.seed, "0 or more")
