"""Exported weights: open_clip makes the same embeddings of them, and loads nothing it would get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import (
    CAPTIONS,
    CONTEXT,
    clip_tokenizer,
    random_images,
    register_architectures,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from modstruct.config import ContrastiveConfig, LossesConfig, ModelConfig, Recipe, ViewsConfig
from modstruct.config.losses import SigmoidConfig
from modstruct.data.sentencepiece_training import train_sentencepiece
from modstruct.data.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer
from modstruct.data.transforms.augment import Views
from modstruct.evaluation.embeddings.open_clip_model import create_open_clip
from modstruct.losses.objective import build_objective
from modstruct.models.two_tower import TwoTower
from modstruct.training.export import export

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory) -> None:
    register_architectures(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return SentencePieceTokenizer(train_sentencepiece(CAPTIONS * 20, 64), CONTEXT)


def trained_a_little(model: TwoTower) -> TwoTower:
    """Every weight and running statistic moved, so that one left out of the export would show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape, generator=generator)
    return model.eval()


def exported(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, independent: bool = False
) -> tuple[TwoTower, Path]:
    model = trained_a_little(tiny_model(config, tokenizer, independent))
    recipe = replace(Recipe(), model=config, views=ViewsConfig(mean=MEAN, std=STD))
    return model, export(folder / "export", dict(model.state_dict()), model.to_open_clip, recipe, tokenizer, 2)


def features(model, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(ids), dim=-1)


def assert_same_embeddings(ours: TwoTower, folder: Path, size: int, ids: Tensor, their_ids: Tensor) -> None:
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()  # strict: it raises on a missing or unknown weight
    with torch.no_grad():
        embeddings = ours({"image": random_images(size), "text": ids})
    image, text = features(theirs, ours.normalize(random_images(size)), their_ids)
    assert_close(embeddings["image"], image, atol=1e-5, rtol=0)
    assert_close(embeddings["text"], text, atol=1e-5, rtol=0)
    assert_close(theirs.logit_scale.exp(), embeddings["logit_scale"])


@pytest.mark.parametrize(("kind", "pool"), [("sentencepiece", "mean"), ("bert_wordpiece", "cls")])
def test_open_clip_makes_the_same_embeddings_of_explicit_sizes(tmp_path, sentencepiece, kind, pool):
    tokenizer = sentencepiece if kind == "sentencepiece" else word_tokenizer()
    model, folder = exported(tmp_path, tiny_config(pool=pool), tokenizer, independent=True)
    assert_same_embeddings(model, folder, 16, tokenizer(CAPTIONS), load_tokenizer(folder / "tokenizer")(CAPTIONS))


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("tiny-vit", 16, "linear"),
        ("tiny-vit-quickgelu", 16, "linear"),
        ("tiny-resnet", 64, "linear"),
        ("tiny-resnet", 64, "attention_pool"),
        ("tiny-timm", 160, "linear"),
    ],
)
def test_open_clip_makes_the_same_embeddings_of_a_named_architecture_with_its_own_tokenizer(tmp_path, name, size, head):
    tokenizer = clip_tokenizer()
    config = tiny_config(name=name, independent_head=head)
    model, folder = exported(tmp_path, config, tokenizer, independent=True)
    their_ids = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert_same_embeddings(model, folder, size, tokenizer(CAPTIONS), their_ids)
    assert open_clip.create_model(f"local-dir:{folder}").vocab_size == 49408  # CLIP's own
    assert torch.equal(create_open_clip(f"local-dir:{folder}")[2](CAPTIONS), their_ids)


def test_a_named_architecture_exports_another_tokenizer_too(tmp_path):
    tokenizer = word_tokenizer()
    model, folder = exported(tmp_path, tiny_config(name="tiny-vit"), tokenizer)
    assert_same_embeddings(model, folder, 16, tokenizer(CAPTIONS), tokenizer(CAPTIONS))


def test_open_clip_hands_out_no_tokenizer_that_is_not_the_models(tmp_path):
    _, folder = exported(tmp_path, tiny_config(), word_tokenizer())
    with pytest.raises((OSError, ValueError)):
        open_clip.get_tokenizer(f"local-dir:{folder}")


def test_independent_heads_lie_in_a_file_of_their_own(tmp_path):
    model, folder = exported(tmp_path, tiny_config(), word_tokenizer(), independent=True)
    heads = load_file(folder / "independent_heads.safetensors")
    assert heads.keys() == {"image.independent_head.weight", "text.independent_head.weight"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in heads.items())
    assert not [name for name in load_file(folder / "open_clip_model.safetensors") if "independent" in name]
    _, folder = exported(tmp_path, tiny_config(), word_tokenizer())
    assert not (folder / "independent_heads.safetensors").exists()


@pytest.mark.parametrize("architecture", ["clip", "bert"])
def test_the_logit_scale_is_exported_as_the_forward_clamps_it(tmp_path, architecture):
    config = tiny_config(architecture, logit_scale_init=1.0, logit_scale_max=1.0)
    model, folder = exported(tmp_path, config, word_tokenizer())
    assert model.logit_scale > 1
    (weights,) = folder.glob("*_model.safetensors")
    assert load_file(weights)["logit_scale"].tolist() == [1.0]


@pytest.mark.parametrize("config", [tiny_config("bert"), tiny_config(stem="conv")])
def test_towers_that_open_clip_lacks_are_exported_under_our_names_and_not_for_it(tmp_path, caplog, config):
    tokenizer = word_tokenizer()
    with caplog.at_level("INFO", "modstruct"):
        model, folder = exported(tmp_path, config, tokenizer, independent=True)
    assert "which modstruct.load reads and open_clip does not" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        open_clip.create_model(f"local-dir:{folder}")
    described = json.loads((folder / "modstruct_config.json").read_text())
    assert described["recipe"]["model"]["text"]["architecture"] == config.text.architecture
    assert described["recipe"]["model"]["vision"]["stem"] == config.vision.stem
    rebuilt = tiny_model(config, load_tokenizer(folder / "tokenizer"), independent=True, seed=9).eval()
    rebuilt.load_state_dict(load_file(folder / "modstruct_model.safetensors"))
    batch = {"image": random_images(), "text": tokenizer(CAPTIONS)}
    assert_close(rebuilt(batch), model(batch))


@pytest.mark.parametrize("image_size", [(16, 16), (37, 61), (90, 40)])
def test_open_clips_preprocessing_gives_our_pixels_but_for_rounding(tmp_path, image_size):
    model, folder = exported(tmp_path, tiny_config(), word_tokenizer())
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    noise = random_images(max(image_size), count=1)[0, :, : image_size[1], : image_size[0]]
    picture = Image.fromarray(noise.permute(1, 2, 0).numpy())
    views = ViewsConfig(mean=MEAN, std=STD)
    model.mean, model.std = views.mean, views.std
    ours = model.normalize(Views(views, 16).evaluation_image(picture)[None])[0]
    one_level = 1.01 / 255 / torch.tensor(STD)[:, None, None]
    assert ((preprocess(picture) - ours).abs() <= one_level).all()


def test_an_export_replaces_an_earlier_one_whole(tmp_path):
    _, folder = exported(tmp_path, tiny_config("bert"), word_tokenizer())
    before = {path.name for path in folder.iterdir()}
    _, folder = exported(tmp_path, tiny_config(), word_tokenizer())
    after = {path.name for path in folder.iterdir()}
    assert before & after == {"tokenizer", "README.md"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt", ".md"}


def test_an_export_keeps_what_others_put_in_its_place(tmp_path):
    folder = tmp_path / "export"
    folder.write_text("mine")
    exported(tmp_path, tiny_config(), word_tokenizer())
    (folder / "image.onnx").write_text("mine")
    for _ in range(2):
        exported(tmp_path, tiny_config(), word_tokenizer())
    kept = [tmp_path / "export-kept-1", tmp_path / "export-kept-2" / "image.onnx"]
    assert [path.read_text() for path in kept] == ["mine", "mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"export", "export-kept-1", "export-kept-2"}


def test_open_clip_takes_the_bias_of_the_sigmoid_loss(tmp_path):
    torch.manual_seed(0)
    tokenizer, views = word_tokenizer(), ViewsConfig(mean=MEAN, std=STD)
    losses = LossesConfig(contrastive=ContrastiveConfig(weight=0.0), sigmoid=SigmoidConfig(weight=1.0))
    model = trained_a_little(TwoTower(tiny_config(), views, tokenizer, build_objective(losses)))
    recipe = replace(Recipe(), model=tiny_config(), views=views)
    folder = export(tmp_path / "export", dict(model.state_dict()), model.to_open_clip, recipe, tokenizer, 2)
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert_close(theirs.logit_bias, model.logit_bias)
    assert_close(theirs.logit_scale, model.logit_scale)
