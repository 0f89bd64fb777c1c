"""Towers by name: open_clip's own, taken apart and put together without a change, with its pretrained weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CAPTIONS,
    CONTEXT,
    VOCABULARY,
    clip_tokenizer,
    random_images,
    register_architectures,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from torch.nn import functional as F
from torch.testing import assert_close

from modstruct.config import ModelConfig, VisionConfig
from modstruct.data.tokenizers import WordPieceTokenizer
from modstruct.models.towers import conv_stem, image_size, open_clip_config

SIDES = {"tiny-vit": 16, "tiny-resnet": 64, "tiny-timm": 160}
by_name = pytest.mark.parametrize("name", SIDES)


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory) -> None:
    register_architectures(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The weights of an architecture as open_clip draws and saves them: (its model, the file)."""
    folder = tmp_path_factory.mktemp("weights")
    models = {}

    def make(name: str) -> tuple[torch.nn.Module, Path]:
        if name not in models:
            torch.manual_seed(7)
            model = open_clip.create_model(name).eval()
            path = folder / f"{name}.safetensors"
            save_file({n: value.contiguous() for n, value in model.state_dict().items()}, path)
            models[name] = model, path
        return models[name]

    return make


class WritesAFileWhenUnpickled:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@by_name
@pytest.mark.parametrize("independent", [False, True])
def test_pretrained_features_are_open_clips(saved, name, independent):
    reference, path = saved(name)
    model = tiny_model(tiny_config(name=name, pretrained=str(path)), clip_tokenizer(), independent).eval()
    images = random_images(SIDES[name])
    with torch.no_grad():
        ours = model({"image": images, "text": clip_tokenizer()(CAPTIONS)})
        theirs = F.normalize(reference.encode_image(model.normalize(images)), dim=-1)
        assert_close(ours["image"], theirs, atol=1e-5, rtol=0)
        # Padded with 0 there, with 49408 here.
        theirs = F.normalize(reference.encode_text(open_clip.get_tokenizer(name)(CAPTIONS)), dim=-1)
        assert_close(ours["text"], theirs, atol=1e-5, rtol=0)


def test_the_logit_scale_is_taken_over_and_kept_between_its_limits(saved, tmp_path):
    path = tmp_path / "scaled.safetensors"
    save_file(load_file(saved("tiny-vit")[1]) | {"logit_scale": torch.tensor(4.0)}, path)
    model = tiny_model(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer())
    assert model.logit_scale.item() == 4.0
    model = tiny_model(tiny_config(name="tiny-vit", pretrained=str(path), logit_scale_max=3.0), clip_tokenizer())
    assert model.logit_scale.item() == 3.0
    bert = tiny_model(tiny_config("bert", name="tiny-vit", pretrained=str(path)), word_tokenizer())
    assert bert.logit_scale.item() == pytest.approx(ModelConfig().logit_scale_init)


def test_a_published_models_mean_and_deviation_must_be_the_recipes(monkeypatch, saved):
    _, path = saved("tiny-vit")
    tag = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setattr("open_clip.pretrained.get_pretrained_cfg", lambda *_: tag)
    with pytest.raises(ValueError, match=r"views.mean = .*was trained with --views.mean '\[0.5, 0.5, 0.5\]'"):
        tiny_model(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer())


def test_a_resnets_pretrained_pooling_stays_the_shared_head(saved):
    reference, path = saved("tiny-resnet")
    config = tiny_config(name="tiny-resnet", pretrained=str(path), independent_head="attention_pool")
    model = tiny_model(config, clip_tokenizer(), independent=True).eval()
    images = random_images(64)
    embeddings = model({"image": images})
    assert_close(embeddings["image"], F.normalize(reference.encode_image(model.normalize(images)), dim=-1))
    shared, own = (dict(model.image[head].named_parameters()) for head in ("head", "independent_head"))
    assert {n: value.shape for n, value in shared.items()} == {n: value.shape for n, value in own.items()}
    assert not torch.equal(shared["v_proj.weight"], own["v_proj.weight"])
    with torch.no_grad():
        model.image["independent_head"].v_proj.weight.zero_()
    after = model({"image": images})
    assert torch.equal(after["image"], embeddings["image"])
    assert not torch.equal(after["image_independent"], embeddings["image_independent"])


def test_a_vit_has_no_attention_pooling_to_double():
    with pytest.raises(ValueError, match=r"model.independent_head = 'attention_pool'.*use linear"):
        tiny_model(tiny_config(name="tiny-vit", independent_head="attention_pool"), clip_tokenizer(), independent=True)


@by_name
def test_independent_heads_stand_beside_any_image_tower(name):
    model = tiny_model(tiny_config(name=name), word_tokenizer(), independent=True)
    embeddings = model({"image": random_images(SIDES[name]), "text": word_tokenizer()(CAPTIONS)})
    embeddings["image_independent"].sum().backward()
    assert model.image["independent_head"].weight.grad.any()
    # The head stands beside the shared one, where the tower lets it: on features before the projection.
    features = {"tiny-vit": 16, "tiny-resnet": 8, "tiny-timm": 64}[name]
    assert model.image["independent_head"].in_features == features


@pytest.mark.parametrize("independent_head", ["linear", "attention_pool"])
def test_every_trained_parameter_of_a_resnet_gets_a_gradient(independent_head):
    config = tiny_config(name="tiny-resnet", independent_head=independent_head)
    model = tiny_model(config, word_tokenizer(), independent=True)
    embeddings = model({"image": random_images(64), "text": word_tokenizer()(CAPTIONS)})
    sum((rows * torch.linspace(0, 1, rows.numel()).view_as(rows)).sum() for rows in embeddings.values()).backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]


def test_clips_vocabulary_gets_a_row_for_padding(saved):
    reference, path = saved("tiny-vit")
    trunk = tiny_model(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer()).text["trunk"]
    rows = trunk.token_embedding.weight
    assert rows.shape == (49409, 16)
    assert torch.equal(rows[:49408], reference.token_embedding.weight)


def test_a_shorter_context_keeps_the_meaning_of_pretrained_positions(saved):
    reference, path = saved("tiny-vit")
    model = tiny_model(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer(8)).eval()
    captions = ["a red square", "two stars"]
    theirs = F.normalize(reference.encode_text(open_clip.get_tokenizer("tiny-vit")(captions)), dim=-1)
    assert_close(model({"text": clip_tokenizer(8)(captions)})["text"], theirs, atol=1e-5, rtol=0)


def test_a_context_beyond_the_pretrained_one_is_refused(saved):
    _, path = saved("tiny-vit")
    with pytest.raises(ValueError, match=r"tokenizer.context_length = 13.*12 positions"):
        tiny_model(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer(CONTEXT + 1))


def test_pretrained_text_needs_its_own_tokenizer(saved):
    _, path = saved("tiny-vit")
    config = tiny_config(name="tiny-vit", pretrained=str(path))
    with pytest.raises(ValueError, match=r"model.pretrained = .*49408 entries.*use tokenizer.kind clip_bpe"):
        tiny_model(config, word_tokenizer())
    padding, *entries = VOCABULARY.split(b"\n")
    others = [b"word%d" % i for i in range(49408 - len(entries))]
    tokenizer = WordPieceTokenizer(b"\n".join([*entries, *others, padding]), CONTEXT)
    same_numbers = (clip_tokenizer().vocab_size, clip_tokenizer().padding_id)
    assert (tokenizer.vocab_size, tokenizer.padding_id) == same_numbers
    with pytest.raises(ValueError, match=r"model.pretrained = .*another than tokenizer.kind bert_wordpiece"):
        tiny_model(config, tokenizer)


def test_a_pretrained_image_tower_serves_beside_bert_with_any_tokenizer(saved):
    reference, path = saved("tiny-vit")
    model = tiny_model(tiny_config("bert", name="tiny-vit", pretrained=str(path)), word_tokenizer()).eval()
    embeddings = model({"image": random_images(), "text": word_tokenizer()(CAPTIONS)})
    assert_close(embeddings["image"], F.normalize(reference.encode_image(model.normalize(random_images())), dim=-1))
    assert embeddings["text"].shape == (len(CAPTIONS), 8)


def test_a_conv_stem_makes_the_grid_of_the_patches():
    stems = {patch: conv_stem(patch, 16) for patch in (2, 4, 8)}
    images = torch.rand(1, 3, 16, 16)
    assert {patch: tuple(stem(images).shape) for patch, stem in stems.items()} == {
        2: (1, 16, 8, 8),
        4: (1, 16, 4, 4),
        8: (1, 16, 2, 2),
    }
    model = tiny_model(tiny_config(stem="conv"), word_tokenizer())
    assert tiny_model(tiny_config(), word_tokenizer()).text.state_dict().keys() == model.text.state_dict().keys()
    model({"image": random_images()})["image"][:, 0].sum().backward()
    assert all(parameter.grad.any() for parameter in model.image["trunk"].conv1.parameters())


def test_a_conv_stem_needs_a_power_of_two():
    with pytest.raises(ValueError, match=r"model.vision.patch_size = 12: a power of two from 2"):
        VisionConfig(image_size=48, patch_size=12, stem="conv")


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_the_mean_of_the_patches_or_the_class_token(stem):
    images = torch.rand(2, 3, 16, 16)
    for pool in ("cls", "mean"):
        trunk = tiny_model(tiny_config(stem=stem, pool=pool), word_tokenizer()).image["trunk"]
        tokens = trunk.ln_post(trunk.transformer(trunk._embeds(images)))
        assert_close(trunk(images), tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))


def test_an_unknown_architecture_is_refused_with_those_that_exist():
    those = {"ViT-B-33": "did you mean ViT-B-32 or ", "hf-hub:someone/something": "it has .*RN50, .*ViT-B-32, "}
    for name, told in those.items():
        with pytest.raises(ValueError, match=rf"model.name = '.*not known to open_clip; {told}"):
            open_clip_config(tiny_config(name=name))


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "roberta-ViT-B-32"])
def test_an_architecture_with_another_kind_of_text_tower_is_refused(name):
    with pytest.raises(ValueError, match=rf"model.name = '{name}'.*not CLIP's transformer"):
        open_clip_config(tiny_config(name=name))


def test_a_text_tower_that_attends_to_padding_is_refused_unless_bert_replaces_it():
    with pytest.raises(ValueError, match=r"model.name = 'tiny-bidirectional'.*model.text.architecture bert"):
        tiny_model(tiny_config(name="tiny-bidirectional"), word_tokenizer())
    model = tiny_model(tiny_config("bert", name="tiny-bidirectional"), word_tokenizer())
    assert model({"image": random_images()})["image"].shape == (len(CAPTIONS), 8)


def test_weights_that_cannot_be_loaded_are_refused_by_name(saved, tmp_path):
    _, other = saved("tiny-resnet")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not weights")
    missing = tmp_path / "missing.safetensors"
    for path, why in ((other, "cannot be loaded"), (damaged, "cannot be loaded"), (missing, "there is no such file")):
        with pytest.raises(ValueError, match=rf"model.pretrained = '{path}'.*{why}") as refusal:
            tiny_model(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer())
        assert "\n" not in str(refusal.value)


def test_pretrained_weights_that_are_not_finite_are_refused_by_name(saved, tmp_path):
    weights = {name: value.contiguous() for name, value in saved("tiny-vit")[0].state_dict().items()}
    save_file(weights | {"visual.proj": weights["visual.proj"] * float("inf")}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"model\.pretrained = .*visual\.proj has 128 of 128 values that are NaN"):
        tiny_model(tiny_config(name="tiny-vit", pretrained=str(tmp_path / "x.safetensors")), clip_tokenizer())


def test_a_weights_file_with_code_in_it_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"visual.proj": WritesAFileWhenUnpickled(ran)}}, path)
    torch.load(path, weights_only=False)  # the trap works where it is let
    ran.unlink()
    bare = tmp_path / "weights.bin"
    bare.write_bytes(pickle.dumps({"visual.proj": WritesAFileWhenUnpickled(ran)}, protocol=2))
    for file in (path, bare):
        with pytest.raises(ValueError, match=r"model.pretrained = .*cannot be loaded"):
            tiny_model(tiny_config(name="tiny-vit", pretrained=str(file)), clip_tokenizer())
        assert not ran.exists()


def test_weights_trained_with_another_activation_name_the_architecture_that_has_it():
    with pytest.raises(ValueError, match=r"model.pretrained = 'openai'.*use model.name RN50-quickgelu"):
        tiny_model(tiny_config(name="RN50", pretrained="openai"), clip_tokenizer())


@by_name
def test_the_named_architecture_decides_the_size_of_the_image(name):
    assert image_size(tiny_config(name=name)) == SIDES[name]
    assert image_size(tiny_config()) == 16


@pytest.mark.parametrize("training", [True, False])
def test_a_resnet_runs_with_weights_in_half_precision_and_statistics_in_float32(training):
    """DeepSpeed casts parameters and leaves buffers; BatchNorm must bear both, and its statistics must not freeze."""
    model = tiny_model(tiny_config(name="tiny-resnet"), clip_tokenizer()).train(training)
    images = {"image": random_images(SIDES["tiny-resnet"])}
    expected = model(images)["image"].detach()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    assert_close(model(images)["image"].detach(), expected, atol=0.1, rtol=0)
    for name, buffer in model.named_buffers():
        if name in before:
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, before[name]) != training, name
