"""open_clip's models embed as open_clip does it itself, and what cannot be loaded is refused with what can be given."""

from __future__ import annotations

import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import CAPTIONS, register_architectures

from modstruct.evaluation.embeddings.open_clip_model import OPTION, open_clip_model

ARCHITECTURES = ["tiny-vit", "tiny-resnet", "tiny-timm"]


@pytest.fixture(scope="module", autouse=True)
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    register_architectures(folder)
    described = json.loads((folder / "tiny-vit.json").read_text())
    (folder / "tiny-custom.json").write_text(json.dumps(described | {"custom_text": True}))
    open_clip.add_model_config(folder)


def noise_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((50, 70))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "tiny-custom"])
def test_a_model_embeds_as_open_clip_does(tmp_path, architecture):
    torch.manual_seed(1)
    theirs, _, preprocess = open_clip.create_model_and_transforms(architecture)
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = open_clip_model(f"{architecture}:{tmp_path / 'weights.pt'}")
    images, ids = [noise_image(seed) for seed in range(3)], open_clip.get_tokenizer(architecture)(CAPTIONS)
    with torch.no_grad():
        image, text = theirs.encode_image(torch.stack(list(map(preprocess, images)))), theirs.encode_text(ids)
        made = ours.encode({"image": torch.stack([ours.views.evaluation_image(p) for p in images])})
        made |= ours.encode({"text": ours.tokenize(CAPTIONS)})
    for name, rows in (("image", image), ("text", text)):
        expected = torch.nn.functional.normalize(rows, dim=-1)
        assert torch.equal(made[name], expected)
    widths = {"image": {"tiny-resnet": 8, "tiny-timm": 64}.get(architecture, 16), "text": 16}
    assert {name: made[f"{name}_features"].shape[1] for name in widths} == widths
    assert not torch.equal(image[0], image[1])
    assert ours.dimension == 8
    assert ours.arrays == {f"{n}{kind}" for n in ("image", "text") for kind in ("", "_features", "_projected")} | {
        "image_augmented"
    }


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    weights = open_clip.create_model("tiny-vit").state_dict()
    weights["visual.proj"][0, 1] = float("nan")
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"{OPTION} = 'tiny-vit:.*visual\.proj has 1 of 128 values that are NaN"):
        open_clip_model(f"tiny-vit:{tmp_path / 'weights.safetensors'}")


def test_features_are_what_the_projection_takes(tmp_path):
    torch.manual_seed(1)
    theirs = open_clip.create_model("tiny-vit").eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = open_clip_model(f"tiny-vit:{tmp_path / 'weights.safetensors'}")
    with torch.no_grad():
        made = ours.encode({"image": torch.randn(3, 3, 16, 16)}) | ours.encode({"text": ours.tokenize(CAPTIONS)})
        image = torch.nn.functional.normalize(made["image_features"] @ theirs.visual.proj, dim=-1)
        text = torch.nn.functional.normalize(made["text_features"] @ theirs.text_projection, dim=-1)
    torch.testing.assert_close(made["image"], image)
    torch.testing.assert_close(made["text"], text)


def test_equal_weights_have_one_fingerprint_whatever_file_they_are_in(tmp_path):
    weights = open_clip.create_model("tiny-vit").state_dict()
    torch.save(weights, tmp_path / "a.pt")
    save_file(weights, tmp_path / "b.safetensors")
    one, other = (open_clip_model(f"tiny-vit:{tmp_path / name}") for name in ("a.pt", "b.safetensors"))
    assert one.fingerprint == other.fingerprint
    weights["logit_scale"] = weights["logit_scale"] + 1e-3
    torch.save(weights, tmp_path / "a.pt")
    assert open_clip_model(f"tiny-vit:{tmp_path / 'a.pt'}").fingerprint != one.fingerprint


def test_random_weights_are_the_same_each_time_and_leave_the_random_state(tmp_path):
    state = torch.get_rng_state()
    one, other = (open_clip_model("tiny-vit", random_weights=True) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert one.details["random_weights"] is True
    assert one.details["logit_scale"] == pytest.approx(1 / 0.07)


def test_views_and_tokenizer_travel_to_loader_workers():
    model = open_clip_model("tiny-vit", random_weights=True)
    views, tokenize = pickle.loads(pickle.dumps((model.views, model.tokenize)))
    assert torch.equal(views.evaluation_image(noise_image(0)), model.views.evaluation_image(noise_image(0)))
    assert torch.equal(tokenize(CAPTIONS), model.tokenize(CAPTIONS))
    augmented = [views.augmented_image(noise_image(0), seed) for seed in (1, 1, 2)]
    assert torch.equal(augmented[0], augmented[1])
    assert not torch.equal(augmented[0], augmented[2])
    assert augmented[0].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "not known to open_clip; it has .*tiny-vit"),
        ("tiny-vit", r"give its weights, tiny-vit:FILE or tiny-vit:TAG of \(it has none\)"),
        ("ViT-B-32:unheard", "unheard is neither a file nor one of its tags .*openai"),
        ("ViT-B-32:openai", "openai was trained with another activation: use ViT-B-32-quickgelu:openai"),
        ("tiny-vit:/no/such.pt", "there is no file /no/such.pt"),
        ("local-dir:/no/such", "cannot be loaded .*give NAME:FILE"),
    ],
)
def test_what_cannot_be_loaded_is_refused(spec, message):
    with pytest.raises(ValueError, match=f"{OPTION} = '{spec}': {message}"):
        open_clip_model(spec)


def test_weights_that_cannot_be_fetched_are_refused_with_the_remedy(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(.*no route to the hub\); give NAME:FILE with a local file"
    ):
        open_clip_model("ViT-B-32:laion2b_s34b_b79k")


def test_a_file_of_other_weights_is_refused(tmp_path):
    torch.save(open_clip.create_model("tiny-resnet").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*tate_dict"):
        open_clip_model(f"tiny-vit:{tmp_path / 'weights.pt'}")
    with pytest.raises(ValueError, match="names weights; leave them out"):
        open_clip_model(f"tiny-vit:{tmp_path / 'weights.pt'}", random_weights=True)
