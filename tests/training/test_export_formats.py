"""Exports for transformers and onnxruntime: the same embeddings, in a program that does not know modstruct."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CAPTIONS, clip_tokenizer, random_images, register_architectures, tiny_config, word_tokenizer
from torch.testing import assert_close

from modstruct.config import LossesConfig, ModelConfig, Recipe, ViewsConfig
from modstruct.config.losses import ContrastiveConfig, SeparationConfig, SigmoidConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model, initial_tokenizer
from modstruct.models.two_tower import TwoTower
from modstruct.training.export_formats import export_onnx, export_transformers

VIEWS = ViewsConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory) -> None:
    register_architectures(tmp_path_factory.mktemp("architectures"))


def trained(config: ModelConfig, tokenizer: Tokenizer, losses: LossesConfig | None = None) -> tuple[TwoTower, Recipe]:
    """A model of which every weight has moved."""
    torch.manual_seed(0)
    losses = losses or LossesConfig(contrastive=ContrastiveConfig(weight=1.0))
    recipe = replace(Recipe(), model=config, views=VIEWS, losses=losses)
    model = TwoTower(config, VIEWS, tokenizer, build_objective(losses)).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value += (0.1 * torch.rand(value.shape)).to(value.dtype)
    return model, recipe


@pytest.mark.parametrize("kind", ["explicit sizes", "CLIP's tokenizer"])
def test_transformers_loads_it_and_a_run_starts_from_it(tmp_path, kind):
    from transformers import AutoModel, AutoProcessor

    of_clip = kind == "CLIP's tokenizer"
    config = tiny_config(name="tiny-vit-quickgelu") if of_clip else tiny_config(pool="cls")
    tokenizer = clip_tokenizer() if of_clip else word_tokenizer()
    losses = LossesConfig(sigmoid=SigmoidConfig(weight=1.0), separation=SeparationConfig(weight=1.0))
    model, recipe = trained(config, tokenizer, losses)
    recipe = replace(recipe, views=replace(VIEWS, evaluation="squeeze" if of_clip else "center_crop"))
    left_out = export_transformers(tmp_path, model, recipe, tokenizer)
    assert len(left_out) == 3  # two heads and a bias
    theirs, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in random_images()]
    texts = [*CAPTIONS, "[SEP] a red <|endoftext|> star", "red " * 50]
    inputs = processor(text=texts, images=pictures, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        made, ours = theirs(**inputs), model({"image": random_images(), "text": tokenizer(texts)})
    assert_close(made.image_embeds, ours["image"], atol=1e-5, rtol=0)
    same = [0, 1, 2, 3, 5] if of_clip else [*range(6)]  # open_clip reads a spelled-out end token as one, which we drop
    assert_close(made.text_embeds[same], ours["text"][same], atol=1e-5, rtol=0)
    views = Views(recipe.views, 16)
    for height, width in ((61, 37), (25, 16), (41, 24)):
        noise = Image.fromarray(random_images(90, count=1)[0, :, :height, :width].permute(1, 2, 0).numpy())
        view = views.evaluation_image(noise)
        if (height, width) == (41, 24) and not of_clip:
            # Of 11 pixels beyond the square transformers cuts off 5 at the top, we and torchvision 6.
            crop = noise.resize((16, 27), Image.Resampling.BICUBIC).crop((0, 5, 16, 21))
            view = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        pixels = processor(images=noise, return_tensors="pt").pixel_values[0]
        levels = (pixels - model.normalize(view[None])[0]).abs() * 255 * torch.tensor(VIEWS.std)[:, None, None]
        assert levels.max() < 2.01
    assert_close(theirs.logit_scale.exp(), ours["logit_scale"].squeeze())

    tokenizer.save(tmp_path / "tokenizer")  # as the command does
    started = replace(recipe, model=replace(config, pretrained=f"{tmp_path}/"))
    brought = initial_tokenizer(started)
    again = build_model(started, brought, build_objective(losses)).eval()
    heads = {f"{tower}.independent_head.weight" for tower in ("image", "text")}
    assert again.new_weights == {"logit_bias"} | heads
    with torch.no_grad():
        assert_close(again({"image": random_images(), "text": tokenizer(texts)})["text"], ours["text"])
    for part, changed, told in (
        ("views", ViewsConfig(), "trained with --views.mean"),
        (
            "model",
            replace(started.model, vision=replace(config.vision, pool="mean"), name=None),
            "pooling by mean|differ",
        ),
        (
            "model",
            replace(started.model, text=replace(config.text, heads=4), name="tiny-vit"),
            "quick_gelu|heads|differ",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            build_model(replace(started, **{part: changed}), brought, build_objective(losses))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (tiny_config(), "pooling by mean"),
        (tiny_config(pool="cls", stem="conv"), "convolutional stem"),
        (tiny_config("bert", pool="cls"), "text tower of kind BertTrunk"),
        (tiny_config(name="tiny-resnet"), "image tower of kind ModifiedResNet"),
        (tiny_config(name="tiny-timm"), "image tower of kind TimmModel"),
    ],
)
def test_what_transformers_cannot_express_is_refused_by_name(tmp_path, config, told):
    tokenizer = clip_tokenizer() if config.name else word_tokenizer()
    model, recipe = trained(config, tokenizer)
    with pytest.raises(ValueError, match=f"--format = 'transformers': .*{told}.*--format onnx"):
        export_transformers(tmp_path, model, recipe, tokenizer)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("config", [tiny_config("bert", "conv"), tiny_config(name="tiny-resnet")])
def test_onnxruntime_gives_the_same_embeddings_for_batches_of_any_size(tmp_path, config):
    import onnxruntime
    from tokenizers import Tokenizer as Backend

    tokenizer, size = (clip_tokenizer(), 64) if config.name else (word_tokenizer(), 16)
    model, recipe = trained(config, tokenizer)
    assert export_onnx(tmp_path, model, recipe, tokenizer) == []
    described = json.loads((tmp_path / "modstruct_onnx.json").read_text())
    ids = np.array([row.ids for row in Backend.from_file(str(tmp_path / "tokenizer.json")).encode_batch(CAPTIONS)])
    assert np.array_equal(ids, tokenizer(CAPTIONS).numpy())
    inputs = {"image": random_images(size).numpy(), "text": ids}
    with torch.no_grad():
        ours = model({name: torch.from_numpy(rows) for name, rows in inputs.items()})
    assert described["logit_scale"] == pytest.approx(ours["logit_scale"].item())
    for name, rows in inputs.items():
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
        for count in (1, 3):
            (made,) = session.run(None, {described[name]["input"]: rows[:count]})
            assert np.abs(made - ours[name][:count].numpy()).max() < 1e-5
