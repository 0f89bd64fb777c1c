"""modstruct.load and modstruct.objective give what the package's own commands give."""

from __future__ import annotations

import io
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import modstruct
from modstruct import checkpoints
from modstruct.cli import parse_recipe_text
from modstruct.data.transforms.decoding import as_decoded, decode_image
from modstruct.data.transforms.image_views import ImageViews
from modstruct.evaluation.embeddings.model import checkpoint_model
from modstruct.training.export import export

ROOT = Path(__file__).parents[1]
WRITTEN = ROOT / "tests" / "checkpoints" / "written_by_0.1.0"
TEXTS = ["a red star", "two blue discs and a moon", "a red star"]


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (50, 40, 3), dtype=np.uint8)) for _ in range(count)]


def encoded(kind: str) -> bytes:
    """An image that is transparent, lies on its side, or has 16 bits a pixel."""
    noise, file = np.random.default_rng(1).integers(0, 256, (50, 40, 4), dtype=np.uint8), io.BytesIO()
    match kind:
        case "transparent":
            Image.fromarray(noise).save(file, "PNG")
        case "turned":
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6
            Image.fromarray(noise[..., :3]).save(file, "JPEG", exif=exif)
        case "16 bits":
            Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["transparent", "turned", "16 bits"])
def test_preprocessing_makes_of_any_image_what_training_makes_of_its_file(kind, tmp_path):
    run, content = WRITTEN / "two_tower", encoded(kind)
    folder = next((run / "checkpoints").iterdir())
    recipe = parse_recipe_text((folder / "recipe.yaml").read_text())
    model, preprocess, tokenizer = modstruct.load(run)
    decoded = decode_image(content, 10**6, kind)
    expected = ImageViews(recipe.views, model.image_size).evaluation_image(decoded)
    assert torch.equal(pickle.loads(pickle.dumps(preprocess))(Image.open(io.BytesIO(content))), expected)
    export(tmp_path, checkpoints.read_weights(folder), model.model.to_open_clip, recipe, tokenizer, 2)
    of_open_clip = modstruct.load(tmp_path)[1]
    assert torch.equal(of_open_clip(Image.open(io.BytesIO(content))), of_open_clip(decoded))
    assert not torch.equal(of_open_clip(decoded), of_open_clip(pictures(1)[0]))


def test_damaged_exif_that_is_noticed_once_the_pixels_are_turned_leaves_them_upright(monkeypatch):
    content = encoded("turned")

    def damaged(*_):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Exif, "tobytes", damaged)
    assert decode_image(content, 10**6, "here").size == (50, 40)
    opened = Image.open(io.BytesIO(content))
    assert as_decoded(opened).size == (50, 40)
    assert opened.size == (40, 50)


def test_no_images_and_no_texts_have_no_embeddings():
    model, preprocess, tokenizer = modstruct.load(WRITTEN / "two_tower")
    none = torch.stack([preprocess(pictures(1)[0])])[:0]
    assert model.encode_image(none).shape == model.encode_text(tokenizer([])).shape == (0, model.dimension)


@pytest.mark.parametrize("kind", ["two_tower", "fusion"])
def test_a_run_a_checkpoint_and_an_export_give_the_embeddings_of_the_evaluation(kind, tmp_path):
    run = WRITTEN / kind
    folder = next((run / "checkpoints").iterdir())
    recipe = parse_recipe_text((folder / "recipe.yaml").read_text())
    model, preprocess, tokenizer = modstruct.load(run)
    images, ids = torch.stack([preprocess(picture) for picture in pictures(2)]), tokenizer(TEXTS)
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(ids)
        expected = checkpoint_model(recipe, str(run)).encode({"image": images, "text": ids})
    assert torch.equal(image, expected["image"])
    assert torch.equal(text, expected["text"])
    assert torch.equal(text[0], text[2])
    assert image.shape == (2, model.dimension)
    similarity = model.similarity(image, text)
    assert torch.allclose(similarity, expected["logit_scale"] * image @ text.T)
    named = model.model.to_open_clip
    export(tmp_path / "export", checkpoints.read_weights(folder), named, recipe, tokenizer, 2)
    for source in (folder, tmp_path / "export"):
        other, preprocess, tokenizer = modstruct.load(source, "cpu")
        assert torch.equal(tokenizer(TEXTS), ids)
        with torch.no_grad():
            again = torch.stack([preprocess(picture) for picture in pictures(2)])
            assert torch.allclose(other.encode_image(again), image, atol=2e-3)  # open_clip scales images its own way
            assert torch.allclose(other.encode_text(ids), text, atol=1e-6)
            assert torch.allclose(other.logit_scale, model.logit_scale)


def test_matching_scores_every_pair_by_the_fusion_encoder():
    model, preprocess, tokenizer = modstruct.load(WRITTEN / "fusion")
    images, ids = torch.stack([preprocess(picture) for picture in pictures(2)]), tokenizer(TEXTS)
    backbone = model.model.backbone
    with torch.no_grad():
        scores = model.match(images, ids)
        one = model.model.match(
            backbone.encode_text(ids[1:2]), backbone.mask(ids[1:2]), backbone.encode_image(images[1:])
        )
    assert scores.shape == (2, 3)
    assert torch.allclose(scores[1, 1], one[0, 1] - one[0, 0], atol=1e-5)
    assert torch.allclose(scores[:, 0], scores[:, 2], atol=1e-5)
    assert not torch.allclose(scores[:, 0], scores[:, 1], atol=1e-3)


def test_no_images_or_no_texts_have_no_scores():
    model, preprocess, tokenizer = modstruct.load(WRITTEN / "fusion")
    images, ids = torch.stack([preprocess(picture) for picture in pictures(2)]), tokenizer(TEXTS)
    assert model.encode_text(ids[:0]).shape == (0, model.dimension)
    assert model.match(images[:0], ids).shape == (0, 3)
    assert model.match(images, ids[:0]).shape == (2, 0)


@pytest.mark.parametrize("form", ["run", "export"])
def test_a_model_can_be_taken_to_another_precision(form, tmp_path):
    run = WRITTEN / "two_tower"
    folder = next((run / "checkpoints").iterdir())
    recipe = parse_recipe_text((folder / "recipe.yaml").read_text())
    model, preprocess, tokenizer = modstruct.load(run)
    if form == "export":
        export(tmp_path, checkpoints.read_weights(folder), model.model.to_open_clip, recipe, tokenizer, 2)
        model, preprocess, tokenizer = modstruct.load(tmp_path)
    images, ids = torch.stack([preprocess(picture) for picture in pictures(2)]), tokenizer(TEXTS)
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(ids)
        model = model.bfloat16()
        assert torch.allclose(model.encode_image(images), image, atol=0.05)
        assert torch.allclose(model.encode_text(ids), text, atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: modstruct.load("runs/nothing"), "source = 'runs/nothing': no such folder; give a run"),
        (lambda: modstruct.load(ROOT / "setup.py"), "give NAME:FILE of open_clip, such as ViT-B-32:"),
        (lambda: modstruct.load(WRITTEN / "snli_ve"), "a fine-tuned model"),
        (
            lambda: modstruct.load("ViT-B32:openai"),
            "source = 'ViT-B32:openai': not known to open_clip; did you mean",
        ),
        (lambda: modstruct.objective("gcc"), "method = 'gcc': no such file"),
        (lambda: modstruct.objective("gc", {"geometri.weight": 1}), "did you mean losses.geometry.weight"),
        (lambda: modstruct.objective("gc", {"geometry.weight": -1.0}), "losses.geometry.weight = -1.0: 0"),
        (lambda: modstruct.load(WRITTEN / "two_tower")[0].match(None, None), "only a fusion model has a matching head"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(wrong, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        wrong()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda preprocess: preprocess("star.png"), "image = 'str': must be an image of Pillow"),
        (lambda preprocess: pictures(1)[0], "images = 'Image': must be what preprocess makes"),
        (lambda preprocess: preprocess(pictures(1)[0]), "must be (B, 3, H, W)"),
        (lambda preprocess: preprocess(pictures(1)[0])[None] / 255, "images = torch.float32: must be uint8"),
    ],
)
def test_images_of_another_kind_are_refused_since_their_embeddings_would_be_wrong(given, told):
    model, preprocess, tokenizer = modstruct.load(WRITTEN / "two_tower")
    with pytest.raises(ValueError, match=re.escape(told)):
        model.encode_image(given(preprocess))
    for wrong in (TEXTS, tokenizer(TEXTS)[0], tokenizer(TEXTS).float()):
        with pytest.raises(ValueError, match=r"ids = .* must be token ids \(B, L\)"):
            model.encode_text(wrong)


@pytest.mark.parametrize("name", ["config.json", "modstruct_onnx.json"])
def test_an_export_for_other_programs_is_named(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"loads this folder; give modstruct the run"):
        modstruct.load(tmp_path)


def test_a_method_and_fields_of_its_losses_make_an_objective():
    losses = modstruct.objective("gc", {"geometry.weight": 0.1})
    assert losses.weights == {"contrastive": 1.0, "geometry": 0.1}
    assert losses.views == {"image_augmented", "text_augmented"}
    assert not losses.independent


def printed(*command: object) -> str:
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout + ended.stderr


def test_the_example_in_plain_ddp_has_the_same_losses_on_one_and_two_processes():
    script = ROOT / "docs" / "examples" / "plain_ddp.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    one, two = printed(sys.executable, script), printed(*torchrun, script)
    losses = [[float(value) for value in re.findall(r"step \d+: ([\d.]+)", text)] for text in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_the_example_in_open_clips_loop_learns():
    text = printed(sys.executable, ROOT / "docs" / "examples" / "open_clip_loop.py")
    losses = [float(value) for value in re.findall(r"Structure_loss: ([\d.]+)", text)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2


def test_an_export_whose_recipe_is_damaged_is_named(tmp_path):
    (tmp_path / "modstruct_model.safetensors").write_bytes(b"")
    (tmp_path / "modstruct_config.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"source = .*modstruct_config\.json cannot be read"):
        modstruct.load(tmp_path)
