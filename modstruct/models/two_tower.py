"""Two towers, one shared space: what a batch of images and captions becomes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.config import ModelConfig, ViewsConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.losses.objective import Objective
from modstruct.models.protocol import Batch, TrainableModel
from modstruct.models.towers import Tower, build_towers, standardised


class TwoTower(TrainableModel):
    """Image and text towers with shared heads, the logit scale, and what the objective needs besides: augmented views,
    the heads of the independent embeddings (deep feature separation), learnt scalars."""

    def __init__(self, config: ModelConfig, views: ViewsConfig, tokenizer: Tokenizer, objective: Objective):
        super().__init__()
        image, text, self.embed_dim = build_towers(config, views, tokenizer, objective.independent)
        self.batch_fields = objective.views
        self.image = _modules(image)
        self.text = _modules(text)
        self.to_open_clip = image.to_open_clip | text.to_open_clip
        log_scale = config.logit_scale_init if text.logit_scale is None else text.logit_scale
        # Shape (1,): DeepSpeed cannot broadcast a parameter without dimensions at stages 2 and 3.
        self.logit_scale = nn.Parameter(torch.tensor([log_scale]).clamp(0.0, config.logit_scale_max))
        self.scalar_limits["logit_scale"] = (0.0, config.logit_scale_max)
        self.add_scalars(objective.scalars)
        self.mean, self.std = views.mean, views.std

    def forward(self, batch: Batch, embed_only: bool = False, features: bool = False) -> dict[str, Tensor]:
        """batch: any of image, image_augmented (B, 3, H, W) uint8 and text, text_augmented (B, L) token ids.

        features: add image_features (B, F) and text_features (B, F'), the plain views before the shared projection, not
        normalised; of a tower that projects inside its pooling, the pooled output. Also image_projected and
        text_projected (B, D), what normalisation takes.
        embed_only: nothing else is made here anyway.
        Returns the fields of Embeddings that the batch allows, float32.
        """
        embeddings = {name: self.clamped(name) for name in self.scalar_limits}
        embeddings["logit_scale"] = embeddings["logit_scale"].exp()
        for name, tower in (("image", self.image), ("text", self.text)):
            views = {key: batch[key] for key in (name, f"{name}_augmented") if key in batch}
            if not views:
                continue
            inputs = torch.cat(list(views.values()))  # one pass for both views
            trunk = tower["trunk"](self.normalize(inputs) if name == "image" else inputs)
            sizes = [len(view) for view in views.values()]
            projected = tower["head"](trunk).float()
            shared = F.normalize(projected, dim=-1).split(sizes)
            embeddings |= dict(zip(views, shared, strict=True))
            if features and name in batch:
                pooled = trunk.float() if trunk.ndim == 2 else projected  # a map of places is pooled in the head
                embeddings[f"{name}_features"] = pooled[: len(batch[name])]
                embeddings[f"{name}_projected"] = projected[: len(batch[name])]
            if "independent_head" in tower:
                own = F.normalize(tower["independent_head"](trunk).float(), dim=-1).split(sizes)
                keys = [key.replace(name, f"{name}_independent") for key in views]
                embeddings |= dict(zip(keys, own, strict=True))
        return embeddings

    def trunks(self) -> dict[str, nn.Module]:
        """The transformers or ResNets alone, by modality."""
        return {"image": self.image["trunk"], "text": self.text["trunk"]}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the towers' dtype, with the recipe's mean and deviation taken out."""
        return standardised(images, self.mean, self.std).to(self.dtype)


def _modules(tower: Tower) -> nn.ModuleDict:
    parts = {"trunk": tower.trunk, "head": tower.head, "independent_head": tower.independent_head}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
