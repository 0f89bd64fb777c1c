"""Two towers for programs that know neither modstruct nor open_clip: as transformers' CLIPModel, and as ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.config import Recipe
from modstruct.data.fast_tokenizers import TEXTS, fast_tokenizer
from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import refuse, require
from modstruct.models.build import image_size
from modstruct.models.transformers_clip import NotClip, clip_config, to_transformers
from modstruct.models.two_tower import TwoTower
from modstruct.training.export import by_open_clips_names

TOLERANCE = 1e-4
"""By how much a number of an exported model's embeddings, of unit norm, may differ from ours."""
OTHERS = "--format onnx takes any two towers, open_clip what that knows (the rest under modstruct's names)"
ONNX = {"image": "image.onnx", "text": "text.onnx"}


def export_transformers(folder: Path, model: TwoTower, recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Write a CLIPModel with its processor: config.json, model.safetensors, preprocessor_config.json, tokenizer files.

    Loaded again, it must give our embeddings to TOLERANCE, through its own preprocessing and tokenizer. Independent
    heads and the bias of the sigmoid loss, which it does not have, are left out, and named in what is returned. Raises
    ValueError naming what of the model CLIPModel does not have.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    try:
        config = clip_config(model.image["trunk"], model.text["trunk"], model.embed_dim)
    except NotClip as error:
        refuse("--format", "transformers", f"{error}; {OTHERS}")
    remedy = "give another tokenizer: transformers takes an end token of id 2 for an old mistake of its own"
    require(tokenizer.end_id != 2, "tokenizer", tokenizer.kind, remedy)
    backend, tokens = fast_tokenizer(tokenizer)
    weights = by_open_clips_names(model.state_dict(), model.to_open_clip)
    left_out = [name for name in weights if "independent_head" in name or name == "logit_bias"]
    renamed = to_transformers({name: value for name, value in weights.items() if name not in left_out})
    renamed["logit_scale"] = model.clamped("logit_scale").squeeze()
    config["text_config"] |= {
        **{f"{name}_id": backend.token_to_id(token) for name, token in tokens.items()},
        "vocab_size": len(weights["text.token_embedding.weight"]),
        "max_position_embeddings": tokenizer.context_length,
    }
    made = CLIPModel(CLIPConfig(**config))
    unknown = renamed.keys() ^ made.state_dict().keys()
    if unknown := {name for name in unknown if not name.endswith("position_ids")}:
        remedy = f"CLIPModel differs in the weights {', '.join(sorted(unknown)[:5])}; {OTHERS}"
        refuse("--format", "transformers", remedy)
    made.load_state_dict(renamed, strict=False)
    made.save_pretrained(folder)
    side = image_size(recipe)
    squeeze = recipe.views.evaluation == "squeeze"
    CLIPImageProcessor(
        size={"height": side, "width": side} if squeeze else {"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_center_crop=not squeeze,
        image_mean=list(recipe.views.mean),
        image_std=list(recipe.views.std),
    ).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.context_length, split_special_tokens=True, **tokens
    ).save_pretrained(folder)
    _check(model, tokenizer, side, _as_loaded(folder), "transformers")
    return [f"{name} (CLIPModel has none)" for name in left_out]


def _as_loaded(folder: Path) -> Callable[[Tensor], dict[str, np.ndarray]]:
    """What transformers makes of images (B, 3, H, W) uint8 and TEXTS."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

    def embed(images: Tensor) -> dict[str, np.ndarray]:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        inputs = processor(text=list(TEXTS), images=pictures, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = model(**inputs)
        return {"image": made.image_embeds.numpy(), "text": made.text_embeds.numpy()}

    return embed


class _Tower(nn.Module):
    """One tower from its input to embeddings of unit norm, for a batch of any size."""

    def __init__(self, model: TwoTower, modality: str):
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, inputs: Tensor) -> Tensor:
        tower = self.model.image if self.modality == "image" else self.model.text
        rows = self.model.normalize(inputs) if self.modality == "image" else inputs
        return F.normalize(tower["head"](tower["trunk"](rows)).float(), dim=-1)


def require_onnx() -> None:
    """Raises ValueError where a package is missing."""
    try:
        import onnx  # noqa: F401  # which torch.onnx needs
        import onnxruntime  # noqa: F401
    except ImportError as error:
        refuse("--format", "onnx", f"pip install onnx onnxruntime, modstruct's extra `export` ({error})")


def export_onnx(folder: Path, model: TwoTower, recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Write image.onnx, text.onnx, tokenizer.json for the `tokenizers` library, and modstruct_onnx.json.

    image.onnx: pixels (B, 3, H, W) uint8, as `modstruct.load`'s preprocess gives them -> (B, D) of unit norm;
    text.onnx: ids (B, L) int64. onnxruntime must give our embeddings to TOLERANCE, at several batch sizes. Returns what
    is left out: independent heads.
    """
    import onnxruntime

    side = image_size(recipe)
    backend, _ = fast_tokenizer(tokenizer)
    inputs = {"image": torch.zeros((2, 3, side, side), dtype=torch.uint8), "text": tokenizer(TEXTS[:2])}
    with _traceable():
        for modality, example in inputs.items():
            torch.onnx.export(
                _Tower(model, modality).eval(),
                (example,),
                str(folder / ONNX[modality]),
                input_names=[modality],
                output_names=["embedding"],
                dynamic_axes={modality: {0: "batch"}, "embedding": {0: "batch"}},
                opset_version=18,
                # By tracing: what torch.export would take needs onnxscript and 20 times as long, and gives the same.
                dynamo=False,
            )
    backend.save(str(folder / "tokenizer.json"))
    described = {
        "image": {
            "input": "image",
            "shape": ["batch", 3, side, side],
            "dtype": "uint8",
            "view": recipe.views.evaluation,
        },
        "text": {"input": "text", "shape": ["batch", tokenizer.context_length], "dtype": "int64"},
        "output": {"name": "embedding", "dimension": model.embed_dim, "norm": 1},
        "logit_scale": model.clamped("logit_scale").exp().item(),
    }
    (folder / "modstruct_onnx.json").write_text(json.dumps(described, indent=1))
    sessions = {
        modality: onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        for modality, file in ONNX.items()
    }

    def embed(images: Tensor) -> dict[str, np.ndarray]:
        inputs = {"image": images.numpy(), "text": np.array([row.ids for row in backend.encode_batch(list(TEXTS))])}
        made = {}
        for modality, rows in inputs.items():  # in two batches of unlike sizes
            parts = [sessions[modality].run(None, {modality: part})[0] for part in (rows[:1], rows[1:])]
            made[modality] = np.concatenate(parts)
        return made

    _check(model, tokenizer, side, embed, "onnx")
    return [name for name in model.state_dict() if "independent_head" in name]


@contextmanager
def _traceable() -> Iterator[None]:
    """Attention without torch's shortcut for inference, which ONNX lacks, and no warnings of torch.onnx's insides."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


@torch.no_grad()
def _check(
    model: TwoTower, tokenizer: Tokenizer, side: int, embed: Callable[[Tensor], Mapping[str, np.ndarray]], form: str
) -> None:
    """Hold an exported model's embeddings, as others load it, against ours."""
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = model({"image": images, "text": tokenizer(TEXTS)}), embed(images)
    differences = {modality: float(np.abs(made - ours[modality].numpy()).max()) for modality, made in theirs.items()}
    told = " and ".join(f"{difference:.1e} ({modality})" for modality, difference in differences.items())
    fits = all(difference <= TOLERANCE for difference in differences.values())  # False of NaN
    require(fits, "--format", form, f"its embeddings differ from ours by {told}, above {TOLERANCE:g}; report it")
    print(f"{form}: its embeddings of {len(images)} images and {len(TEXTS)} texts differ from ours by at most {told}")
