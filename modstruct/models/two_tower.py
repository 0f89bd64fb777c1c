"""Two towers, one shared space: what a batch of images and captions becomes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.config import ModelConfig, ViewsConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import sample_seed
from modstruct.errors import refuse
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
        self.patch_dropout: PatchDropout | None = None

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
            if name == "image" and self.patch_dropout is not None:
                self.patch_dropout.seeds = _patch_seeds(batch, views)
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

    def drop_patches(self, rate: float) -> None:
        """Leave this share of the patches out where a batch has patch_seed. Raises ValueError for another image tower
        than a ViT of open_clip's."""
        from open_clip.transformer import VisionTransformer

        trunk = self.image["trunk"]
        remedy = "0: the image tower is no ViT of open_clip's, whose patches could be left out"
        if not isinstance(trunk, VisionTransformer):
            refuse("train.patch_dropout", rate, remedy)
        self.patch_dropout = trunk.patch_dropout = PatchDropout(rate)
        self.batch_fields |= {"patch_seed"}

    def trunks(self) -> dict[str, nn.Module]:
        """The transformers or ResNets alone, by modality."""
        return {"image": self.image["trunk"], "text": self.text["trunk"]}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the towers' dtype, with the recipe's mean and deviation taken out."""
        return standardised(images, self.mean, self.std).to(self.dtype)


class PatchDropout(nn.Module):
    """Keeps the class token and, of each image, round((1 - rate) patches), one at least, in any order: positions are
    in them already."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.seeds: Tensor | None = None
        """Of the images of the next forward, (B,) int64; None keeps all patches."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1 + patches, width) -> (B, 1 + kept, width)."""
        if self.seeds is None:
            return tokens
        patches = tokens.shape[1] - 1
        kept = max(1, round((1 - self.rate) * patches))
        draws = sample_seed(0, 0, self.seeds[:, None] + torch.arange(patches, device=tokens.device), "patch")
        places = 1 + draws.topk(kept, dim=1).indices
        chosen = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :1], chosen], dim=1)


def _patch_seeds(batch: Batch, views: Batch) -> Tensor | None:
    """Of all images of the views, (B,) int64, or None where the batch has all patches."""
    if "patch_seed" not in batch:
        return None
    return torch.cat([sample_seed(0, 0, batch["patch_seed"], view) for view in views])


def _modules(tower: Tower) -> nn.ModuleDict:
    parts = {"trunk": tower.trunk, "head": tower.head, "independent_head": tower.independent_head}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
