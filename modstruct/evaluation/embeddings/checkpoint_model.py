"""A checkpoint of modstruct, of either framework, as a model that embeds sets."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.data.transforms.augment import Views
from modstruct.errors import refuse
from modstruct.evaluation.embeddings.model import EmbeddingModel, weights_fingerprint
from modstruct.evaluation.saved_model import saved_model
from modstruct.losses.objective import build_objective
from modstruct.models.build import image_size

OF_BOTH = ("", "_features", "_projected")
SHARED = (*(f"{modality}{kind}" for modality in ("image", "text") for kind in OF_BOTH), "image_augmented")
INDEPENDENT = ("image_independent", "text_independent")


def checkpoint_model(recipe: Recipe, checkpoint: str, name: str | None = None) -> EmbeddingModel:
    """Read a checkpoint's weights; every process calls it.

    recipe: the checkpoint's, with overrides. checkpoint: its folder, or a run's for its last one. name: for tables, by
    default the run's and the step's. Raises ValueError naming what is wrong.
    """
    # The main process's choice: a run that is still training may write another one in between.
    path = distributed.broadcast_object(checkpoints.find(checkpoint, checkpoint, "--checkpoint"))
    if path is None:
        refuse("--checkpoint", checkpoint, "this run has no checkpoint yet")
    tokenizer = checkpoints.read_tokenizer(path)
    model = saved_model(recipe, path, tokenizer)
    size = image_size(recipe)
    # Captions are embedded as they are: WordNet, which only augmented ones need, may be missing.
    views = replace(recipe.views, eda_synonyms=False)
    independent = INDEPENDENT if build_objective(recipe.losses).independent else ()
    tokenizer_print = hashlib.sha256(tokenizer.model).hexdigest()[:16]
    return EmbeddingModel(
        name=name or "/".join((path.resolve().parents[1].name, path.name)),
        fingerprint=weights_fingerprint(model.state_dict()),
        dimension=model.embed_dim,
        arrays=frozenset((*SHARED, *independent)),
        views=Views(views, size),
        tokenize=tokenizer,
        encode=lambda batch: model(batch, features=True),
        preprocessing=f"views {asdict(views)} of {size} pixels; tokenizer {tokenizer.kind} {tokenizer_print} of "
        f"{tokenizer.context_length} tokens",
        details={"checkpoint": str(path), "framework": recipe.framework},
    )
