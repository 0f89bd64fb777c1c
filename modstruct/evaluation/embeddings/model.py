"""What embeds: one interface for the checkpoints of modstruct and the models of open_clip, and the first of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.data.shards.evaluation_samples import EvaluationViews
from modstruct.data.tokenizers import Tokenizer, load_tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.distributed.collect import on_main
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.set_files import IMAGE_ARRAYS, TEXT_ARRAYS
from modstruct.losses.objective import build_objective
from modstruct.models.bounded import no_larger_than
from modstruct.models.build import build_model, image_size
from modstruct.models.protocol import TrainableModel, load_weights

Encode = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""{"image": (B, 3, H, W) views} -> image and what else of `arrays` one pass gives; {"text": ids} alike; (B, …) each."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """A model in evaluation mode, whole on each process or an engine, with its own preprocessing and tokenizer."""

    encode: Encode
    views: EvaluationViews
    tokenize: Callable[[Sequence[str]], Tensor]
    """Texts -> ids (B, L); pickles to loader workers."""
    name: str = "model"
    """What tables call it."""
    fingerprint: str = ""  # `weights_fingerprint`
    dimension: int = 0  # D of the shared embeddings; like the fingerprint needed for sets that are kept
    arrays: frozenset[str] = frozenset({"image", "text"})  # that it can make
    preprocessing: str = ""
    """Views and tokenizer in words: equal words, equal inputs of the towers."""
    details: dict = field(default_factory=dict)
    """Further entries of the manifest, in plain JSON types."""

    def described(self) -> dict:
        """The model in the manifest of an embedded set."""
        own = {"name": self.name, "fingerprint": self.fingerprint, "dimension": self.dimension}
        return own | {"preprocessing": self.preprocessing} | self.details

    def chosen_arrays(self, wanted: Sequence[str]) -> list[str]:
        """The wanted arrays, `all` being those the model makes. Raises ValueError for one that it does not make."""
        known = (*IMAGE_ARRAYS, *TEXT_ARRAYS)
        for name in wanted:
            require(name in (*known, "all"), "embedding.arrays", name, f"may be {', '.join(known)} or all")
            remedy = f"{self.name} does not make it; it makes {', '.join(sorted(self.arrays))}"
            require(name in (*self.arrays, "all"), "embedding.arrays", name, remedy)
        needed = {"image"} | ({"text"} if {*wanted} & {*TEXT_ARRAYS} else set())
        return [name for name in known if name in (self.arrays if "all" in wanted else {*wanted} | needed)]


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights and buffers by name: names, kinds, shapes and bytes; wherever they lie."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def find_checkpoint(checkpoint: str) -> Path:
    """The folder that --checkpoint names, of a run the last one, on every process; ValueError where there is none."""
    # The main process decides: a run that is still training may write another one in between.
    path: Path | None = on_main(lambda: checkpoints.find(checkpoint, checkpoint, "--checkpoint"))
    return path or refuse("--checkpoint", checkpoint, "this run has no checkpoint yet")


def load_model(recipe: Recipe, path: Path, tokenizer: Tokenizer) -> TrainableModel:
    """The model of a checkpoint's folder, whole and in evaluation mode, on this process's device."""
    weights = checkpoints.read_measured(path, recipe.evaluation.ema)
    return model_of(recipe, weights, path, tokenizer, "--checkpoint").to(distributed.device())


def model_of(
    recipe: Recipe, weights: Mapping[str, Tensor], path: Path, tokenizer: Tokenizer, option: str
) -> TrainableModel:
    """The model of weights by our names, in evaluation mode. path, option: where they lie and what named them."""
    with no_larger_than(weights, option, path):
        model = build_model(recipe, tokenizer, build_objective(recipe.losses), read_weights=False)
    load_weights(model, weights, path)
    return model.eval()


def checkpoint_model(recipe: Recipe, checkpoint: str, name: str | None = None) -> EmbeddingModel:
    """Read a checkpoint's weights; every process calls it.

    recipe: the checkpoint's, with overrides. checkpoint: as in find_checkpoint. name: by default run and step.
    """
    path, size = find_checkpoint(checkpoint), image_size(recipe)
    tokenizer = load_tokenizer(path / "tokenizer")
    model = load_model(recipe, path, tokenizer)
    # Captions are embedded as they are: WordNet, which only augmented ones need, may be missing.
    views = replace(recipe.views, eda_synonyms=False)
    left_out = () if build_objective(recipe.losses).independent else ("image_independent", "text_independent")
    tokenizer_print = hashlib.sha256(tokenizer.model).hexdigest()[:16]
    return EmbeddingModel(
        name=name or "/".join((path.resolve().parents[1].name, path.name)),
        fingerprint=weights_fingerprint(model.state_dict()),
        dimension=model.embed_dim,
        arrays=frozenset({*IMAGE_ARRAYS, *TEXT_ARRAYS} - {*left_out}),
        views=Views(views, size),
        tokenize=tokenizer,
        encode=lambda batch: model(batch, features=True),
        preprocessing=f"views {asdict(views)} of {size} pixels; tokenizer {tokenizer.kind} {tokenizer_print} of "
        f"{tokenizer.context_length} tokens",
        details={
            "checkpoint": str(path),
            "framework": recipe.framework,
            "logit_scale": float(model.clamped("logit_scale").detach().exp()),
        },
    )
