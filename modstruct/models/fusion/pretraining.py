"""The fusion model in pre-training: encoders, heads, momentum copy and queue, and what the losses need."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct import distributed
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.masking import IGNORED, masked_places
from modstruct.distributed import RowExchange
from modstruct.embeddings import FusionOutputs
from modstruct.losses.objective import Objective
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import LanguageHead, initialise
from modstruct.models.fusion.momentum import FeatureQueue, FollowedModel
from modstruct.models.fusion.negatives import NONE, hard_negatives
from modstruct.models.fusion.published import QUEUE
from modstruct.models.two_tower import Clamp

PAIR_FIELDS = frozenset({"image_id", "text_id", "slot"})
BLANK_FIELDS = frozenset({"text_masked", "masked_labels"})
TRAINING_FIELDS = PAIR_FIELDS | BLANK_FIELDS


class FusionModel(FollowedModel):
    """ALBEF's pre-training model (Li et al. 2021, sections 3.1 to 3.3), with independent heads on request.

    Called with images or texts it embeds them; with all its `batch_fields` too, it makes all that the objective asks
    for. `momentum` and `queue` are no weights of it: see momentum.py.
    """

    outputs = FusionOutputs

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
        self.logit_scale_range = config.log_scale_range
        self.logit_scale = nn.Parameter(-torch.tensor([config.temperature_init]).log())
        self.matches = "matching" in objective.weights
        self.fills_blanks = "masked_language" in objective.weights
        self.negatives = recipe.losses.matching.negatives
        self.seed = recipe.train.seed
        self.queue_after = config.queue_after
        self.batch_fields = TRAINING_FIELDS if self.fills_blanks else PAIR_FIELDS
        self._freeze_unused()
        self.start_momentum(config.momentum)
        self._outside.append(FeatureQueue(config.queue, config.embed_dim))

    @property
    def constants(self) -> frozenset[str]:
        """Names of outputs that no gradient reaches."""
        augmented = ("image", "text", "image_independent", "text_independent")
        return frozenset(
            {f"{name}_augmented" for name in augmented} | {"image_queue", "text_queue", "pair_ids", "queue_ids"}
        )

    @property
    def queue(self) -> FeatureQueue:
        return self._outside[1]

    def forward(self, batch: dict[str, Tensor], embed_only: bool = False, features: bool = False) -> dict[str, Tensor]:
        """batch: any of image (B, 3, H, W) uint8 and text (B, L) ids, and for training all `batch_fields` as well.

        embed_only: in training, leave out what matching and masked language modelling need. A micro-batch brings its
        negatives: wrong_image, wrong_text as image and text, has_wrong_image and has_wrong_text (B,).
        features: add image_features (B, F) and text_features (B, F'), the first tokens before the shared projection,
        and image_projected and text_projected (B, D), what normalisation takes.
        masked_places (M, 2): where masked_labels has labels; without it the model looks there, and waits for the GPU.
        Returns the fields of FusionOutputs that the batch allows, float32; a plain dict, because ZeRO-3 looks for the
        tensors whose gradients it must wait for in dicts and tuples only.
        """
        made = {"logit_scale": Clamp.apply(self.logit_scale.float(), *self.logit_scale_range).exp()}
        training = batch.keys() >= self.batch_fields
        fills_blanks = training and self.fills_blanks and not embed_only
        image = text = blanked = None
        if "image" in batch:
            image = self.backbone.encode_image(batch["image"])
            made |= self.embed("image", image[:, 0], features)
        if "text" in batch:
            text, blanked = self._encode_texts(self.backbone, batch, fills_blanks)
            made |= self.embed("text", text[:, 0], features)
        if not training:
            return made
        if fills_blanks and "masked_places" not in batch:
            batch = batch | {"masked_places": masked_places(batch["masked_labels"])}
        made |= self._momentum_outputs(batch, fills_blanks)
        matches = self.matches and not embed_only
        drawn = self.draw_negatives(made, batch) if matches and "wrong_image" not in batch else None
        if fills_blanks:  # before the wrong rows are exchanged: RowExchange says why
            logits, labels = self._fill_blanks(self, batch, image, blanked)
            made |= {"masked_logits": logits, "masked_labels": labels}
        if matches:
            made |= self._matching(batch, image, text, drawn)
        return made

    def _freeze_unused(self) -> None:
        """What no loss reaches is not trained: weight decay would wear it away, as ZeRO gives it a gradient of 0."""
        used = {
            "matching_head": self.matches,
            "language_head": self.fills_blanks,
            "backbone.fusion": self.matches or self.fills_blanks,
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

    def _encode_texts(
        self, backbone: Backbone, batch: dict[str, Tensor], blanked: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens of the captions and, mostly in the same pass, of the captions with blanks."""
        if not blanked:
            return backbone.encode_text(batch["text"]), None
        # The blanks' mask is the caption's: a word may have been replaced by any id, padding among them.
        mask = backbone.mask(batch["text"])
        if backbone.training and backbone.bert.hidden_dropout_prob > 0:
            # The gradient cache embeds the captions alone first: on them, dropout must fall as it did there.
            return tuple(backbone.encode_text(batch[name], mask) for name in ("text", "text_masked"))
        ids = torch.cat([batch["text"], batch["text_masked"]])
        plain, with_blanks = backbone.encode_text(ids, mask.repeat(2, 1)).chunk(2)
        return plain, with_blanks

    def _fill_blanks(
        self, model: FusionModel, batch: dict[str, Tensor], image: Tensor, blanked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, vocabulary) over the words and the right ids (M,), at the M blanks of these rows."""
        hidden = model.backbone.fuse(blanked, self.backbone.mask(batch["text"]), image)
        row, column = batch["masked_places"].unbind(dim=1)
        logits = model.language_head(hidden[row, column], model.backbone.words.word_embeddings)
        return logits.float(), batch["masked_labels"][row, column]

    @torch.no_grad()
    def _momentum_outputs(self, batch: dict[str, Tensor], fills_blanks: bool) -> dict[str, Tensor]:
        """The momentum model's embeddings, which are the augmented views, its logits at the blanks, and the queues."""
        copy: FusionModel = self.momentum.module
        with self.autocast(batch["image"].device):
            image = copy.backbone.encode_image(batch["image"])
            text, blanked = self._encode_texts(copy.backbone, batch, fills_blanks)
            own = copy.embed("image", image[:, 0]) | copy.embed("text", text[:, 0])
            made = {f"{name}_augmented": rows for name, rows in own.items()}
            if fills_blanks:
                made["masked_logits_momentum"], _ = self._fill_blanks(copy, batch, image, blanked)
        filled = self.queue.filled
        made |= {"image_queue": self.queue.image[:filled], "text_queue": self.queue.text[:filled]}
        return made | {"pair_ids": batch["image_id"], "queue_ids": self.queue.ids[:filled]}

    def draw_negatives(
        self, made: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[RowExchange, Tensor, RowExchange, Tensor]:
        """The exchange that brings each row its wrong image, and whether there is one, (B,); the same of captions.

        made: embeddings, shared and augmented, and the scale. Where there is none, a row gets its own.
        """
        ids, scale = (batch["image_id"], batch["text_id"]), made["logit_scale"].detach()
        mine = torch.arange(len(ids[0]), device=ids[0].device) + distributed.rank() * len(ids[0])

        def negative(rows: str, candidates: str) -> tuple[RowExchange, Tensor]:
            given = made[rows].detach(), made[f"{candidates}_augmented"], scale, *ids, batch["slot"]
            found = hard_negatives(*given, self.seed, candidates, self.negatives)
            return RowExchange(torch.where(found == NONE, mine, found)), found != NONE

        return *negative("text", "image"), *negative("image", "text")

    def _matching(
        self,
        batch: dict[str, Tensor],
        image: Tensor,
        text: Tensor,
        drawn: tuple[RowExchange, Tensor, RowExchange, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Logits (3 B, 2) of pairs, of texts with a wrong image, of images with a wrong text; and labels.

        drawn: the wrong ones; None for a micro-batch, which brings them.
        """
        mask = self.backbone.mask(batch["text"])
        if drawn is None:
            has_image, has_text = batch["has_wrong_image"], batch["has_wrong_text"]
            wrong_image = self.backbone.encode_image(batch["wrong_image"])
            wrong_text, wrong_mask = (
                self.backbone.encode_text(batch["wrong_text"]),
                self.backbone.mask(batch["wrong_text"]),
            )
        else:
            image_of, has_image, text_of, has_text = drawn
            wrong_image, wrong_text = image_of(image), text_of(text)
            wrong_mask = text_of(mask.to(torch.uint8)).bool()
        logits = self.match(
            torch.cat([text, text, wrong_text]),
            torch.cat([mask, mask, wrong_mask]),
            torch.cat([image, wrong_image, image]),
        )
        labels = [torch.ones_like(batch["slot"])]
        labels += [torch.where(has, torch.zeros_like(batch["slot"]), IGNORED) for has in (has_image, has_text)]
        return {"matching_logits": logits, "matching_labels": torch.cat(labels)}

    def follow(self, outputs: FusionOutputs, batch: dict[str, Tensor], step: int = 0) -> None:
        """After an optimizer step: the momentum weights follow, the queue takes the batch's momentum embeddings."""
        super().follow(outputs, batch, step)
        if step < self.queue_after:
            return
        rows = (outputs.image_augmented, outputs.text_augmented, batch["image_id"])
        self.queue.push(*(distributed.gather(row) for row in rows))

    def outside_state(self) -> dict[str, Tensor]:
        return super().outside_state() | {f"{QUEUE}{name}": value for name, value in self.queue.state().items()}

    def load_outside_state(self, state: dict[str, Tensor]) -> None:
        super().load_outside_state(state)
        self.queue.load({n.removeprefix(QUEUE): value for n, value in state.items() if n.startswith(QUEUE)})

    def outside_to(self, device: torch.device) -> None:
        super().outside_to(device)
        self.queue.to(device)
