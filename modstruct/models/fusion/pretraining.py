"""The fusion model in pre-training: encoders, heads, EMA copy and queue, and what the losses need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct import distributed
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.text_views import IGNORED, masked_places
from modstruct.distributed import RowExchange
from modstruct.losses.objective import Objective
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import LanguageHead, initialise
from modstruct.models.fusion.ema import EmaModel, FeatureQueue
from modstruct.models.fusion.negatives import NONE, hard_negatives
from modstruct.models.fusion.published import QUEUE
from modstruct.models.protocol import Batch

PAIR_FIELDS = frozenset({"image_id", "text_id", "slot"})
TRAINING_FIELDS = PAIR_FIELDS | {"text_masked", "masked_labels"}


class FusionModel(EmaModel):
    """ALBEF's pre-training model (Li et al. 2021, sections 3.1 to 3.3), with independent heads on request.

    Called with images or texts it embeds them; with all its `batch_fields` too, it makes all that the objective asks
    for. `ema` and `queue` are no weights of it: see ema.py.
    """

    constants = frozenset(
        f"{kind}_augmented" for kind in ("image", "text", "image_independent", "text_independent")
    ) | frozenset({"image_queue", "text_queue", "pair_ids", "queue_ids"})
    shared_outputs = frozenset({"logit_scale", "image_queue", "text_queue", "queue_ids"})
    place_fields = frozenset({"masked_places"})

    def __init__(self, recipe: Recipe | FinetuneRecipe, tokenizer: Tokenizer, objective: Objective):
        super().__init__()
        config = recipe.fusion
        self.backbone = Backbone(config, recipe.views, tokenizer)
        self.embed_dim = config.embed_dim
        widths = {"image": self.backbone.image_width, "text": self.backbone.text_width}
        self.image_head, self.text_head = (nn.Linear(width, config.embed_dim) for width in widths.values())
        self.matching_head = nn.Linear(widths["text"], 2)
        self.language_head = LanguageHead(self.backbone.bert)
        for head in (self.image_head, self.text_head, self.matching_head, self.language_head):
            initialise(head, widths["text"])
        # After all shared weights, so that they do not depend on what the losses need.
        self.independent = objective.independent
        if self.independent:
            self.image_independent_head = nn.Linear(widths["image"], config.embed_dim, bias=False)
            self.text_independent_head = nn.Linear(widths["text"], config.embed_dim, bias=False)
        self.scalar_limits["logit_scale"] = config.log_scale_range
        self.logit_scale = nn.Parameter(-torch.tensor([config.temperature_init]).log())
        self.add_scalars(objective.scalars)
        self.matches = "matching" in objective.weights
        self.masks = "masked_language" in objective.weights
        self.negatives = recipe.losses.matching.negatives
        self.seed = recipe.train.seed
        self.queue_after = config.queue_after
        self.batch_fields = TRAINING_FIELDS if self.masks else PAIR_FIELDS
        self._freeze_unused()
        self.start_ema(config.momentum)
        self._queue = [FeatureQueue(config.queue, config.embed_dim)]

    @property
    def matcher(self) -> FusionModel:
        return self

    @property
    def queue(self) -> FeatureQueue:
        return self._queue[0]

    def forward(self, batch: Batch, embed_only: bool = False, features: bool = False) -> dict[str, Tensor]:
        """batch: any of image (B, 3, H, W) uint8 and text (B, L) ids, and for training all `batch_fields` as well.

        embed_only: in training, leave out what matching and masked language modelling need. A micro-batch brings what
        `exchange` made.
        features: add image_features (B, F) and text_features (B, F'), the first tokens before the shared projection,
        and image_projected and text_projected (B, D), what normalisation takes.
        masked_places (M, 2): where masked_labels has labels; without it the model looks there, and waits for the GPU.
        Returns the fields of Outputs that the batch allows, float32.
        """
        made = {name: self.clamped(name) for name in self.scalar_limits}
        made["logit_scale"] = made["logit_scale"].exp()
        training = batch.keys() >= self.batch_fields
        masks = training and self.masks and not embed_only
        if "image" in batch:
            image = self.backbone.encode_image(batch["image"])
            made |= self.embed("image", image[:, 0], features)
        if "text" in batch:
            text, masked = self._encode_texts(self.backbone, batch, masks)
            made |= self.embed("text", text[:, 0], features)
        if not training:
            return made
        if masks and "masked_places" not in batch:
            batch = batch | {"masked_places": masked_places(batch["masked_labels"])}
        made |= self._ema_outputs(batch, masks)
        matches = self.matches and not embed_only
        drawn = self._draw_negatives(made, batch) if matches and "wrong_image" not in batch else None
        if masks:  # before the wrong rows are exchanged: RowExchange says why
            logits, labels = self._masked_logits(self, batch, image, masked)
            made |= {"masked_logits": logits, "masked_labels": labels}
        if matches:
            made |= self._matching(batch, image, text, drawn)
        return made

    def _freeze_unused(self) -> None:
        """What no loss reaches is not trained: weight decay would wear it away, as ZeRO gives it a gradient of 0."""
        used = {
            "matching_head": self.matches,
            "language_head": self.masks,
            "backbone.fusion": self.matches or self.masks,
        }
        for name, reached in used.items():
            self.get_submodule(name).requires_grad_(reached)

    def trunks(self) -> dict[str, nn.Module]:
        """The three encoders."""
        return self.backbone.trunks()

    def embed(self, modality: str, summary: Tensor, features: bool = False) -> dict[str, Tensor]:
        """Shared and independent embeddings, (B, D) float32 of unit norm, of the first tokens (B, width).

        features: the first tokens too, as `modality`_features, and what normalisation takes, as `modality`_projected.
        """
        heads = {modality: getattr(self, f"{modality}_head")}
        if self.independent:
            heads[f"{modality}_independent"] = getattr(self, f"{modality}_independent_head")
        projected = {name: head(summary).float() for name, head in heads.items()}
        made = {name: F.normalize(rows, dim=-1) for name, rows in projected.items()}
        if features:
            made |= {f"{modality}_features": summary.float(), f"{modality}_projected": projected[modality]}
        return made

    def match(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Logits (B, 2), not matching and matching, of text tokens with their mask against image tokens, row by row."""
        text, image = (tokens.to(self.logit_scale.dtype) for tokens in (text, image))
        return self.matching_head(self.backbone.fuse(text, mask, image)[:, 0]).float()

    def _encode_texts(self, backbone: Backbone, batch: Batch, masks: bool) -> tuple[Tensor, Tensor]:
        """Tokens of the captions and, mostly in the same pass, of the masked captions; of the captions twice else."""
        if not masks:
            text = backbone.encode_text(batch["text"])
            return text, text
        # The padding mask is the caption's: a word may have been replaced by any id, padding among them.
        mask = backbone.mask(batch["text"])
        if backbone.training and backbone.bert.hidden_dropout_prob > 0:
            # The gradient cache embeds the captions alone first: on them, dropout must fall as it did there.
            return backbone.encode_text(batch["text"], mask), backbone.encode_text(batch["text_masked"], mask)
        ids = torch.cat([batch["text"], batch["text_masked"]])
        plain, masked = backbone.encode_text(ids, mask.repeat(2, 1)).chunk(2)
        return plain, masked

    def _masked_logits(self, model: FusionModel, batch: Batch, image: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, vocabulary) over the words and the right ids (M,), at the M masked tokens of these rows."""
        hidden = model.backbone.fuse(masked, self.backbone.mask(batch["text"]), image)
        row, column = batch["masked_places"].unbind(dim=1)
        logits = model.language_head(hidden[row, column], model.backbone.words.word_embeddings)
        return logits.float(), batch["masked_labels"][row, column]

    @torch.no_grad()
    def _ema_outputs(self, batch: Batch, masks: bool) -> dict[str, Tensor]:
        """The EMA model's embeddings, which are the augmented views, its masked tokens' logits, and the queues."""
        copy = cast(FusionModel, self._ema[0].module)
        with self.autocast(batch["image"].device):
            image = copy.backbone.encode_image(batch["image"])
            text, masked = self._encode_texts(copy.backbone, batch, masks)
            own = copy.embed("image", image[:, 0]) | copy.embed("text", text[:, 0])
            made = {f"{name}_augmented": rows for name, rows in own.items()}
            if masks:
                made["masked_logits_ema"], _ = self._masked_logits(copy, batch, image, masked)
        filled = self.queue.filled
        made |= {"image_queue": self.queue.image[:filled], "text_queue": self.queue.text[:filled]}
        return made | {"pair_ids": batch["image_id"], "queue_ids": self.queue.ids[:filled]}

    def exchange(self, outputs: Mapping[str, Tensor], batch: Batch) -> Callable[[], Batch]:
        """For every row a wrong image and a wrong caption, to be encoded beside it, and its three labels."""
        if not self.matches:
            return dict
        images, texts, labels = self._draw_negatives(outputs, batch)
        return lambda: {
            "wrong_image": images(batch["image"]),
            "wrong_text": texts(batch["text"]),
            "matching_labels": labels,
        }

    def _draw_negatives(self, outputs: Mapping[str, Tensor], batch: Batch) -> tuple[RowExchange, RowExchange, Tensor]:
        """What brings each row its wrong image, the same of captions, and labels (B, 3) of the pair, the row with the
        wrong image, the row with the wrong caption.

        outputs: embeddings, shared and augmented, and the scale. Where there is no negative, a row gets its own.
        """
        ids, scale = (batch["image_id"], batch["text_id"]), outputs["logit_scale"].detach()
        mine = torch.arange(len(ids[0]), device=ids[0].device) + distributed.rank() * len(ids[0])

        def negative(rows: str, candidates: Literal["image", "text"]) -> tuple[RowExchange, Tensor]:
            given = outputs[rows].detach(), outputs[f"{candidates}_augmented"], scale, *ids, batch["slot"]
            found = hard_negatives(*given, self.seed, candidates, self.negatives)
            label = torch.where(found != NONE, torch.zeros_like(batch["slot"]), IGNORED)
            return RowExchange(torch.where(found == NONE, mine, found)), label

        (images, of_image), (texts, of_text) = negative("text", "image"), negative("image", "text")
        return images, texts, torch.stack([torch.ones_like(batch["slot"]), of_image, of_text], dim=1)

    def _matching(
        self, batch: Batch, image: Tensor, text: Tensor, drawn: tuple[RowExchange, RowExchange, Tensor] | None
    ) -> dict[str, Tensor]:
        """Logits (3 B, 2) of pairs, of texts with a wrong image, of images with a wrong text; and labels.

        drawn: the negatives; None for a micro-batch, which brings them.
        """
        mask = self.backbone.mask(batch["text"])
        if drawn is None:
            labels = batch["matching_labels"]
            wrong_image = self.backbone.encode_image(batch["wrong_image"])
            wrong_text = self.backbone.encode_text(batch["wrong_text"])
            wrong_mask = self.backbone.mask(batch["wrong_text"])
        else:
            images, texts, labels = drawn
            wrong_image, wrong_text = images(image), texts(text)
            wrong_mask = texts(mask.to(torch.uint8)).bool()
        logits = self.match(
            torch.cat([text, text, wrong_text]),
            torch.cat([mask, mask, wrong_mask]),
            torch.cat([image, wrong_image, image]),
        )
        return {"matching_logits": logits, "matching_labels": labels.T.flatten()}

    def update_ema(self, outputs: Mapping[str, Tensor], batch: Batch, step: int) -> None:
        """The queue takes the batch's EMA embeddings too."""
        super().update_ema(outputs, batch, step)
        if step < self.queue_after:
            return
        image, text = distributed.gather(outputs["image_augmented"]), distributed.gather(outputs["text_augmented"])
        self.queue.push(image, text, distributed.gather(batch["image_id"]))

    def ema_state_dict(self) -> dict[str, Tensor]:
        return super().ema_state_dict() | {f"{QUEUE}{name}": value for name, value in self.queue.state().items()}

    def load_ema_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_ema_state_dict(state)
        self.queue.load({n.removeprefix(QUEUE): value for n, value in state.items() if n.startswith(QUEUE)})

    def ema_to(self, device: torch.device) -> None:
        super().ema_to(device)
        self.queue.to(device)
