"""Open answers to questions about images: a decoder that ranks or generates them (Li et al. 2021, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import require
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import LanguageHead, Layers, Words, initialise
from modstruct.models.fusion.ema import EmaModel

CROSS_ATTENTION_INPUTS = (".crossattention.self.key.weight", ".crossattention.self.value.weight")


class AnswerModel(EmaModel):
    """Question and image, fused -> answer, by causal layers with cross attention to the fused question (VQA's model).

    Answers are ids as a tokenizer makes them: start, tokens, end, padding. The EMA model softens the tokens' labels
    where task.alpha is above 0.
    """

    def __init__(self, recipe: FinetuneRecipe, tokenizer: Tokenizer):
        """Raises ValueError for a task.answer_context above the tokenizer's context, which bounds the positions."""
        super().__init__()
        task = recipe.task
        fits = task.answer_context <= tokenizer.context_length
        remedy = f"at most the tokenizer's context of {tokenizer.context_length} tokens"
        require(fits, "task.answer_context", task.answer_context, remedy)
        self.backbone = Backbone(recipe.fusion, recipe.views, tokenizer)
        bert, width = self.backbone.bert, self.backbone.text_width
        layers = task.decoder_layers or recipe.fusion.text.fusion_layers
        self.words = Words(bert)
        self.decoder = Layers(bert, 0, layers, seen_width=width, causal=True)
        self.head = LanguageHead(bert)
        for part in (self.words, self.decoder, self.head):
            initialise(part, width)
        self.start_id, self.end_id, self.padding_id = tokenizer.start_id, tokenizer.end_id, tokenizer.padding_id
        self.answer_context = task.answer_context
        self.distils = task.alpha > 0
        if self.distils:
            self.start_ema(task.momentum)

    def trunks(self) -> dict[str, nn.Module]:
        """The three encoders and the decoder."""
        return super().trunks() | {"decoder": self.decoder}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every token of the answers, predicted from those before it: Outputs' fields, a row for each token.

        batch: image (B, 3, H, W) uint8, text (B, L) ids, and A >= 1 answers: answer (A, L') ids, answer_of (A,)
        int64, the row of the question that each belongs to, answer_weight (A,) float32, answer_tokens (T, 2), as
        `answer_tokens` makes them. A row's weight is its answer's. With the sum over rows divided by the questions, as
        losses/distillation.py does it, that is ALBEF's loss.
        """
        answer, device = batch["answer"], batch["answer"].device
        row, place = batch["answer_tokens"].unbind(dim=1)
        made = {
            "logits": self._answer_logits(batch),
            "labels": answer[row, place],
            "weights": batch["answer_weight"][row],
            # Filled on the device: a number copied from the host would make it wait for the GPU.
            "entries": answer.new_full((1,), len(batch["text"])),
        }
        if self.distils:
            with torch.no_grad(), self.autocast(device):
                made["logits_ema"] = self.ema_model._answer_logits(batch)
        return made

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Fused question tokens (B, L, text_width) and their mask (B, L), of image (B, 3, H, W) and text (B, L)."""
        mask = self.backbone.mask(batch["text"])
        text, image = self.backbone.encode_text(batch["text"]), self.backbone.encode_image(batch["image"])
        return self.backbone.fuse(text, mask, image), mask

    def decode(self, answers: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (A, L', text_width); state t sees the answer up to token t and predicts token t + 1.

        answers: (A, L') ids. question: (A, L, text_width), of each answer's question, and mask (A, L).
        """
        return self.decoder(self.words(answers), self.backbone.mask(answers), question, mask)

    @torch.no_grad()
    def rank(
        self, batch: dict[str, Tensor], answers: Tensor, candidates: int, at_once: int = 8
    ) -> tuple[Tensor, Tensor]:
        """The best of a list of answers to each question.

        batch: image (B, 3, H, W) and text (B, L). answers: (N, L') ids. The `candidates` answers with the likeliest
        first token are ranked by the likelihood of all their tokens, `at_once` of each question together, which
        bounds memory. Ties go to the earlier answer. The number of forward passes depends on N, candidates and
        at_once only, as ZeRO-3 needs it.
        Returns numbers into the list (B, k) and log likelihoods (B, k), best first, k = min(candidates, N).

        ALBEF's code counts the first token's log probability twice in the likelihood; here it counts once.
        """
        question, mask = self.encode(batch)
        start = answers[:1, :1].expand(len(question), 1)
        first = self._logits(self.decode(start, question, mask)[:, 0]).log_softmax(dim=-1)  # (B, vocabulary)
        kept = _descending(first[:, answers[:, 1]])[:, :candidates]
        lengths = self.backbone.mask(answers).sum(dim=1)
        kept = kept.gather(1, lengths[kept].argsort(dim=1))  # answers of like lengths go together
        parts = []
        for some in kept.split(at_once, dim=1):
            parts.append(self._likelihoods(answers[some][..., : lengths[some].max()], question, mask))
        kept, places = kept.sort(dim=1)
        likelihoods = torch.cat(parts, dim=1).gather(1, places)
        order = _descending(likelihoods)
        return kept.gather(1, order), likelihoods.gather(1, order)

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor]) -> Tensor:
        """Greedy decoding: (B, task.answer_context) ids, padding after the end.

        batch: image (B, 3, H, W) and text (B, L). An answer without end is cut at the context. The number of forward
        passes is always the same, as ZeRO-3 needs it of all processes.
        """
        question, mask = self.encode(batch)
        answers = torch.full((len(question), 1), self.start_id, device=question.device)
        ended = torch.zeros_like(answers[:, 0], dtype=torch.bool)
        for _ in range(self.answer_context - 1):
            token = self._logits(self.decode(answers, question, mask)[:, -1]).argmax(dim=-1)
            token = token.masked_fill(ended, self.padding_id)
            ended |= (token == self.end_id) | (token == self.padding_id)
            answers = torch.cat([answers, token[:, None]], dim=1)
        return answers

    def starting_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of pre-training and what the decoder starts from, unless they have a decoder already.

        Its layers start from the last fusion layers (further layers keep their initialisation), its words from the text
        encoder's, its head from masked language modelling's. Fusion layers attend to image tokens, the decoder to the
        question's: where these differ in width, keys and values of the cross attention keep their initialisation.
        """
        numbers = sorted({int(name.split(".")[3]) for name in weights if name.startswith("backbone.fusion.layer.")})
        sources = {
            f"backbone.fusion.layer.{number}.": f"decoder.layer.{place}."
            for place, number in enumerate(numbers[-len(self.decoder.layer) :])
        }
        sources |= {"backbone.words.": "words.", "language_head.": "head."}
        expected = self.state_dict()
        added = {}
        for name, value in weights.items():
            source = next((source for source in sources if name.startswith(source)), None)
            if source is None:
                continue
            own = sources[source] + name.removeprefix(source)
            if not own.endswith(CROSS_ATTENTION_INPUTS) or expected[own].shape == value.shape:
                added[own] = value
        return added | weights

    def _answer_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (T, vocabulary) of all the answers' tokens, padding left out."""
        question, mask = self.encode(batch)
        of = batch["answer_of"]
        return self._token_logits(batch["answer"], batch["answer_tokens"], question[of], mask[of])

    def _token_logits(self, answers: Tensor, tokens: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        """Logits (T, vocabulary) of those tokens (T, 2) of answers (A, L'), none the first; the rest as in decode."""
        row, place = tokens.unbind(dim=1)
        return self._logits(self.decode(answers[:, :-1], question, mask)[row, place - 1])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, self.words.word_embeddings).float()

    def _likelihoods(self, answers: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        """Log likelihoods (B, c) of c answers to each question: answers (B, c, L') ids."""
        rows, count = answers.flatten(0, 1), answers.shape[1]
        predicted = answer_tokens(rows, self.padding_id)
        row, place = predicted.unbind(dim=1)
        seen = (each.repeat_interleave(count, dim=0) for each in (question, mask))
        logits = self._token_logits(rows, predicted, *seen)
        tokens = logits.new_zeros(rows.shape)
        tokens[row, place] = -F.cross_entropy(logits, rows[row, place], reduction="none")
        return tokens.sum(dim=1).view(-1, count)


def answer_tokens(answers: Tensor, padding_id: int) -> Tensor:
    """Row and place of all tokens but the first and padding, (T, 2), row by row, of answers (A, L') ids.

    Waits for a GPU: in training, the loader makes them on the host.
    """
    real = answers != padding_id
    real[:, 0] = False
    return real.nonzero()


def _descending(values: Tensor) -> Tensor:
    """Columns (B, N) of values (B, N), the largest of each row first, equal ones in their order."""
    return values.argsort(dim=1, descending=True, stable=True)
