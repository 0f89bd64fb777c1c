"""Trained models and the losses for programs of your own: no DeepSpeed is started, and any device will do.

    model, preprocess, tokenizer = modstruct.load("runs/scenes")
    with torch.no_grad():
        image = model.encode_image(preprocess(Image.open("star.png"))[None])
        text = model.encode_text(tokenizer(["a red star", "a blue moon"]))
        model.similarity(image, text).softmax(dim=1)

The names that stay from version to version: load, objective, the methods of Model and Objective, modstruct.pairwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct import checkpoints, distributed
from modstruct.cli import losses_of, parse_recipe_text
from modstruct.config.migrations import is_fine_tuning
from modstruct.data.tokenizers import load_tokenizer
from modstruct.data.transforms.decoding import as_decoded
from modstruct.data.transforms.image_views import ImageViews
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.model import model_of
from modstruct.evaluation.embeddings.open_clip_model import LOCAL, create_open_clip, pixels_of
from modstruct.losses.objective import Objective, build_objective
from modstruct.models.build import image_size
from modstruct.models.fusion.initial_weights import EXPORTED, find_folder, recipe_of
from modstruct.models.protocol import TrainableModel

Preprocess = Callable[[Image.Image], Tensor]
"""An image of any size and mode, as Pillow opens it -> (3, H, W), as Model.encode_image takes it: uint8, of open_clip's
models float32. As in training it is turned upright by its EXIF orientation, and transparent parts become white."""
Tokenize = Callable[[Sequence[str]], Tensor]
"""Texts -> token ids, (B, L) int64."""


class Model(nn.Module, ABC):
    """A trained model in evaluation mode. Gradients flow, unless `torch.no_grad()` saves their memory."""

    dimension: int
    """D, of the shared embeddings."""
    image_size: int
    """In pixels."""
    uint8_images: bool
    """Whether preprocess makes uint8, which the model normalises, or float32, normalised already."""

    def encode_image(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) of preprocess, on any device -> (B, D) float32, unit norm. Raises ValueError for others:
        pixels of another range would have embeddings, too, but wrong ones."""
        images = self._checked_images(images)
        return self._encode_image(images) if len(images) else torch.empty((0, self.dimension), device=self.device)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids: (B, L) of the tokenizer, on any device -> (B, D) float32, unit norm. Raises ValueError for others."""
        ids = self._checked_ids(ids)
        return self._encode_text(ids) if len(ids) else torch.empty((0, self.dimension), device=self.device)

    @abstractmethod
    def _encode_image(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _encode_text(self, ids: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """1 / temperature, a scalar."""

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """logit_scale x cosine of each image (I, D) with each text (T, D): (I, T), logits of a softmax over either."""
        return self.logit_scale * image @ text.T

    def match(self, images: Tensor, ids: Tensor) -> Tensor:
        """How much better each pair matches than not, by the fusion encoder's matching head: (I, T) logits.

        images: (I, 3, H, W); ids: (T, L). Reranking adds it to `similarity` (evaluation/retrieval/reranking.py says
        why). Cost: a pass of the fusion encoder for each pair. Raises ValueError for a model of two towers.
        """
        refuse("model.match", "two towers", "only a fusion model has a matching head, which scores pairs")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _checked_images(self, images: Tensor) -> Tensor:
        made = "what preprocess makes: torch.stack([preprocess(image) for image in images])"
        require(isinstance(images, Tensor), "images", type(images).__name__, f"must be {made}")
        shape, dtype = tuple(images.shape), images.dtype
        require(images.dim() == 4 and shape[1] == 3, "images", shape, f"must be (B, 3, H, W), {made}")
        right = dtype == torch.uint8 if self.uint8_images else dtype.is_floating_point
        kind = "uint8" if self.uint8_images else "float32, normalised"
        require(right, "images", dtype, f"must be {kind}, {made}")
        return images.to(self.device)

    def _checked_ids(self, ids: Tensor) -> Tensor:
        remedy = "must be token ids (B, L), as the tokenizer makes them of a list of texts"
        require(isinstance(ids, Tensor), "ids", type(ids).__name__, remedy)
        given = f"{ids.dtype} {tuple(ids.shape)}"
        require(ids.dim() == 2 and ids.dtype in (torch.int64, torch.int32), "ids", given, remedy)
        return ids.to(self.device)


class _Ours(Model):
    uint8_images = True

    def __init__(self, model: TrainableModel, pixels: int):
        super().__init__()
        self.model, self.dimension, self.image_size = model, model.embed_dim, pixels

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.model({"image": images})["image"]

    def _encode_text(self, ids: Tensor) -> Tensor:
        return self.model({"text": ids})["text"]

    @property
    def logit_scale(self) -> Tensor:
        return self.model.clamped("logit_scale").exp().squeeze()

    def match(self, images: Tensor, ids: Tensor) -> Tensor:
        matcher = self.model.matcher
        if matcher is None:
            return super().match(images, ids)
        images, ids = self._checked_images(images), self._checked_ids(ids)
        if not len(images) or not len(ids):
            return torch.empty((len(images), len(ids)), device=self.device)
        image, text = matcher.backbone.encode_image(images), matcher.backbone.encode_text(ids)
        mask = matcher.backbone.mask(ids)
        rows = [matcher.match(text, mask, one.expand(len(text), -1, -1)) for one in image]
        return torch.stack([row[:, 1] - row[:, 0] for row in rows])


@dataclass(frozen=True)
class _Preprocess:
    """Any image is first made what training and evaluation make of it; pickles to loader workers."""

    view: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        remedy = "must be an image of Pillow: Image.open(FILE), Image.fromarray(ARRAY)"
        require(isinstance(image, Image.Image), "image", type(image).__name__, remedy)
        return self.view(as_decoded(image))


class _OpenClip(Model):
    uint8_images = False

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.image_size = model, pixels_of(model)
        with torch.no_grad():
            self.dimension = self.encode_image(torch.zeros((1, 3, self.image_size, self.image_size))).shape[1]

    def _encode_image(self, images: Tensor) -> Tensor:
        if images.dtype == torch.float32:  # of preprocess, which knows nothing of a model taken to half precision
            images = images.to(next((p.dtype for p in self.model.visual.parameters() if p.dim() == 4), torch.float32))
        return F.normalize(self.model.encode_image(images).float(), dim=-1)

    def _encode_text(self, ids: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.exp().squeeze()


def load(source: str | Path, device: str | torch.device | None = None) -> tuple[Model, Preprocess, Tokenize]:
    """A trained model, its preprocessing and its tokenizer.

    source: the folder of a run (its last checkpoint), a checkpoint or an export of ours, of two towers or the fusion
    model; or a model of open_clip as `evaluate.py --open_clip` takes it (NAME:TAG, NAME:FILE, hf-hub:…, local-dir:…).
    device: by default the GPU, where there is one. Raises ValueError that names the source and what would be right.
    """
    path = Path(source).expanduser()
    device = torch.device(device) if device is not None else distributed.device()
    is_export = (path / "open_clip_config.json").is_file()  # of two towers that open_clip knows
    if path.is_dir() and not is_export:
        return _load_ours(path, device)
    is_name = is_export or ":" in str(source)
    remedy = "no such folder; give a run, a checkpoint, an export or open_clip's NAME:TAG"
    if path.is_file():
        remedy = f"a file does not name its architecture: give NAME:FILE of open_clip, such as ViT-B-32:{source}"
    require(is_name, "source", str(source), remedy)
    model, preprocess, tokenizer = create_open_clip(f"{LOCAL}{path}" if is_export else str(source), option="source")
    return _OpenClip(model).to(device), _Preprocess(preprocess), tokenizer


def _load_ours(path: Path, device: torch.device) -> tuple[Model, Preprocess, Tokenize]:
    folder = find_folder(str(path), "source")
    assert folder is not None
    made_with = recipe_of(str(folder), "source")
    remedy = "a fine-tuned model: `evaluate.py task` measures it; give the pre-trained one"
    require(not is_fine_tuning(made_with), "source", str(path), remedy)
    recipe = parse_recipe_text(yaml.safe_dump(made_with))
    weights: Mapping[str, Tensor]
    if (folder / EXPORTED).is_file():
        weights = checkpoints.read_weight_file(folder / EXPORTED, "source")
    else:
        weights = checkpoints.read_measured(folder, recipe.evaluation.ema)
    tokenizer = load_tokenizer(folder / "tokenizer")
    pixels, model = image_size(recipe), model_of(recipe, weights, folder, tokenizer, "source")
    preprocess = _Preprocess(ImageViews(recipe.views, pixels).evaluation_image)
    return _Ours(model, pixels).to(device).eval(), preprocess, tokenizer


def objective(method: str, options: Mapping[str, object] | None = None) -> Objective:
    """The losses of a method, for a trainer of your own, on one process or under torch.distributed.

    method: by its name, as `--method` takes it, or a YAML file. options: fields of its losses, such as
    {"geometry.weight": 0.1}. Call it with this process's rows and the step, `total, terms = losses(outputs, step)`:
    outputs are those of embeddings.py that the method needs (losses.views and losses.independent tell which), float32
    and of unit norm. The value is that of the global batch, on every process, and the gradients' mean over processes,
    which DistributedDataParallel takes, is its gradient. Raises ValueError that names what is wrong.
    """
    return build_objective(losses_of(method, options or {}))
