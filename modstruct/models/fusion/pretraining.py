"""The fusion model in pre-training: encoders, heads, EMA weights, queue and hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct import distributed
from modstruct.checkpoints import Piece
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import sample_seed
from modstruct.data.transforms.text_views import IGNORED, masked_places
from modstruct.distributed import RowExchange
from modstruct.losses.objective import Objective
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import LanguageHead, initialise
from modstruct.models.fusion.ema import EmaModel, FeatureQueue
from modstruct.models.fusion.published import QUEUE
from modstruct.models.protocol import Batch

PAIR_FIELDS = frozenset({"image_id", "text_id", "slot"})
TRAINING_FIELDS = PAIR_FIELDS | {"text_masked", "masked_labels"}
NONE = -1
"""For a negative, where every candidate is a positive."""
NUMBERS_AT_ONCE = 1 << 22
"""Similarities, in float64, that hard negatives hold in memory together."""


class FusionModel(EmaModel):
    """ALBEF's pre-training model (Li et al. 2021, sections 3.1 to 3.3), with independent heads on request.

    Called with images or texts it embeds them; with all its `batch_fields` too, it makes every output that the
    objective needs. `ema` and `queue` are not among its parameters and buffers: see ema.py.
    """

    constants = frozenset(
        f"{kind}_augmented" for kind in ("image", "text", "image_independent", "text_independent")
    ) | frozenset({"image_queue", "text_queue", "pair_ids", "queue_ids"})
    shared_outputs = frozenset({"logit_scale", "image_queue", "text_queue", "queue_ids"})
    whole_fields = PAIR_FIELDS | {"image", "text", "masked_labels"}

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
        self.second_view = recipe.losses.queue_contrast.weight > 0 and recipe.losses.queue_contrast.in_modal
        if self.second_view:
            self.batch_fields |= {"image_augmented", "text_augmented"}
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
            text, masked = self._encode_texts(self.backbone, batch, batch["text"], masks)
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
        """Freeze what no loss reaches: ZeRO gives it a gradient of 0, and weight decay would shrink it."""
        used = {
            "matching_head": self.matches,
            "language_head": self.masks,
            "backbone.fusion": self.matches or self.masks,
        }
        for name, reached in used.items():
            self.get_submodule(name).requires_grad_(reached)

    def embed(self, modality: str, summary: Tensor, features: bool = False) -> dict[str, Tensor]:
        """Shared and independent embeddings, (B, D) float32 of unit norm, of the first tokens (B, width).

        features: the first tokens too, as `modality`_features, and what normalisation takes, as `modality`_projected.
        """
        heads = {modality: self.get_submodule(f"{modality}_head")}
        if self.independent:
            heads[f"{modality}_independent"] = self.get_submodule(f"{modality}_independent_head")
        projected = {name: head(summary).float() for name, head in heads.items()}
        made = {name: F.normalize(rows, dim=-1) for name, rows in projected.items()}
        if features:
            made |= {f"{modality}_features": summary.float(), f"{modality}_projected": projected[modality]}
        return made

    def match(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Logits (B, 2), not matching and matching, of text tokens with their mask against image tokens, row by row."""
        text, image = (tokens.to(self.dtype) for tokens in (text, image))
        return self.matching_head(self.backbone.fuse(text, mask, image)[:, 0]).float()

    def _encode_texts(self, backbone: Backbone, batch: Batch, captions: Tensor, masks: bool) -> tuple[Tensor, Tensor]:
        """Tokens of the captions, of either view, and, mostly in the same pass, of the masked captions; of the captions
        twice else."""
        if not masks:
            text = backbone.encode_text(captions)
            return text, text
        # The padding mask is the caption's: a masked token may have become any id, padding included.
        mask = backbone.mask(batch["text"])
        if backbone.training and backbone.bert.hidden_dropout_prob > 0:
            # The gradient cache embeds the captions alone first: on them, dropout must fall as it did there.
            return backbone.encode_text(captions), backbone.encode_text(batch["text_masked"], mask)
        ids = torch.cat([captions, batch["text_masked"]])
        plain, masked = backbone.encode_text(ids, torch.cat([backbone.mask(captions), mask])).chunk(2)
        return plain, masked

    def _masked_logits(self, model: FusionModel, batch: Batch, image: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, vocabulary) over the words and the right ids (M,), at the M masked tokens of these rows."""
        hidden = model.backbone.fuse(masked, self.backbone.mask(batch["text"]), image)
        row, column = batch["masked_places"].unbind(dim=1)
        logits = model.language_head(hidden[row, column], model.backbone.words.word_embeddings)
        return logits.float(), batch["masked_labels"][row, column]

    @torch.no_grad()
    def _ema_outputs(self, batch: Batch, masks: bool) -> dict[str, Tensor]:
        """The EMA model's embeddings, which are the augmented views, its masked tokens' logits, and the queues.

        It reads what this model reads, as ALBEF's does, or a second view of image and caption, as TCL's.
        """
        model, view = self.ema_model, "_augmented" if self.second_view else ""
        with self.autocast(batch["image"].device):
            image = model.backbone.encode_image(batch[f"image{view}"])
            text, masked = self._encode_texts(model.backbone, batch, batch[f"text{view}"], masks)
            own = model.embed("image", image[:, 0]) | model.embed("text", text[:, 0])
            made = {f"{name}_augmented": rows for name, rows in own.items()}
            if masks:
                made["masked_logits_ema"], _ = self._masked_logits(model, batch, image, masked)
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
        """The exchanges of wrong images and of wrong captions, and labels (B, 3) of the pair, the row with the wrong
        image, the row with the wrong caption.

        outputs: embeddings, shared and augmented, and the scale. Without a negative, a row gets its own.
        """
        slots, scale = batch["slot"], outputs["logit_scale"].detach()
        mine = torch.arange(len(slots), device=slots.device) + distributed.rank() * len(slots)

        def negative(rows: str, candidates: Literal["image", "text"]) -> tuple[RowExchange, Tensor]:
            given = outputs[rows].detach(), outputs[f"{candidates}_augmented"], scale, batch
            found = hard_negatives(*given, self.seed, candidates, self.negatives)
            label = torch.where(found != NONE, torch.zeros_like(slots), IGNORED)
            return RowExchange(torch.where(found == NONE, mine, found)), label

        (images, of_image), (texts, of_text) = negative("text", "image"), negative("image", "text")
        return images, texts, torch.stack([torch.ones_like(slots), of_image, of_text], dim=1)

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
        return super().ema_state_dict() | self._queue_state()

    def ema_pieces(self) -> dict[str, Piece]:
        return super().ema_pieces() | {name: Piece.share(value) for name, value in self._queue_state().items()}

    def load_ema_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_ema_state_dict(state)
        self.queue.load({name.removeprefix(QUEUE): state[name] for name in state if name.startswith(QUEUE)})

    def _queue_state(self) -> dict[str, Tensor]:
        return {f"{QUEUE}{name}": value for name, value in self.queue.state().items()}

    def ema_to(self, device: torch.device) -> None:
        super().ema_to(device)
        self.queue.to(device)


@torch.no_grad()
def hard_negatives(
    rows: Tensor,
    candidates: Tensor,
    logit_scale: Tensor,
    batch: Batch,
    seed: int,
    of: Literal["image", "text"],
    scope: Literal["global", "local"] = "global",
) -> Tensor:
    """The row of the global batch that is the hard negative of each of this process's rows, (B,) int64, or NONE.

    A candidate is drawn with probability proportional to exp(similarity / temperature), as in ALBEF (Li et al. 2021,
    section 3.2), but from the pairs of all processes, never a positive (see `_Pairs`), and by a random number that
    depends on the seed and the row's place in the data: neither on the process nor on the number of processes.

    rows: (B, D), unit norm, of one modality; candidates: (B, D) of the other, this process's. batch: image_id and
    text_id, (B,), equal where two pairs have the same image or the same caption, and slot, (B,), places in the data.
    of: modality of the candidates. scope: `local` takes candidates of this process only.
    """
    own = batch["text_id" if of == "image" else "image_id"]
    first, own_of, other_of = distributed.rank() * len(rows), own, batch[f"{of}_id"]
    if scope == "global":
        first = 0
        candidates, own_of, other_of = map(distributed.gather, (candidates, own_of, other_of))
    pairs, candidates = _Pairs(own_of, other_of), candidates.double()
    aims = sample_seed(seed, 0, batch["slot"], of).double() / 2**63
    at_once = max(1, NUMBERS_AT_ONCE // len(candidates))
    parts = zip(*(each.split(at_once) for each in (rows, own, aims)), strict=True)
    draws = [_draw(some, candidates, logit_scale, pairs.positive(ids), aim) for some, ids, aim in parts]
    found = torch.cat(draws)
    return torch.where(found == NONE, found, found + first)


def _draw(rows: Tensor, candidates: Tensor, logit_scale: Tensor, positive: Tensor, aims: Tensor) -> Tensor:
    """The candidate of each row (b, D), (b,), or NONE.

    candidates: (N, D) float64. positive: (b, N), the ones left out. aims: (b,), in [0, 1), which decide.
    """
    logits = (rows.double() @ candidates.T) * logit_scale.double()
    logits = logits.masked_fill(positive, -torch.inf)
    best = logits.max(dim=1, keepdim=True).values
    weights = (logits - best).exp().nan_to_num(0.0)  # a row without a candidate: -inf less -inf
    sums = weights.cumsum(dim=1)
    total = sums[:, -1:]
    # The first place whose sum is above the aim; its own weight is above 0, so it is never a positive.
    chosen = torch.searchsorted(sums, aims[:, None] * total, right=True).clamp(max=logits.shape[1] - 1).squeeze(1)
    sound = weights.gather(1, chosen[:, None]).squeeze(1) > 0
    chosen = torch.where(sound, chosen, weights.argmax(dim=1))  # rounding at the very end of the sums
    return torch.where(total.squeeze(1) > 0, chosen, NONE)


class _Pairs:
    """The pairs of the batch as (own content, content of the candidates' modality), each by its id: two times (N,)."""

    def __init__(self, own_of: Tensor, other_of: Tensor):
        # An id's place among the sorted ones stands for it, so that two of them make one number.
        self.own_sorted = own_of.sort().values
        self.other = torch.searchsorted(other_of.sort().values, other_of)
        self.pairs = self._number(own_of, self.other).sort().values

    def positive(self, own: Tensor) -> Tensor:
        """Where a row, by its own id (b,), and a candidate belong together, (b, N).

        Some pair of the batch has the row's content and the candidate's, be it the row's own pair, the candidate's, or
        a third one that shares a caption with the one and an image with the other. Every own id occurs among the
        pairs'.
        """
        wanted = self._number(own[:, None], self.other)
        places = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        return self.pairs[places] == wanted

    def _number(self, own: Tensor, other: Tensor) -> Tensor:
        return torch.searchsorted(self.own_sorted, own) * len(self.own_sorted) + other
