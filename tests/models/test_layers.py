"""Locked layers and layer-wise learning rates: which weights learn, and how fast."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import clip_tokenizer, register_architectures, tiny_config, tiny_model, word_tokenizer

from modstruct.config import OptimizerConfig, VisionConfig
from modstruct.models.layers import lock_layers, places, rate_factors
from modstruct.training.ds_config import parameter_groups


def three_layers(**options):
    return tiny_config(vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=3, head_width=8), **options)


def learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_places_go_from_input_to_output():
    known = places(tiny_model(three_layers(), word_tokenizer()))
    image = {name.removeprefix("image.trunk."): place.layer for name, place in known.items() if place.tower == "image"}
    assert {image[name] for name in ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight")} == {0}
    assert [image[f"transformer.resblocks.{n}.ln_1.weight"] for n in range(3)] == [1, 2, 3]
    assert image["ln_post.weight"] == 4
    assert {place.layers for place in known.values() if place.tower == "image"} == {3}


@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_the_last_layers_learn_and_the_heads_of_independent_embeddings_always(unlocked):
    config = three_layers(unlocked_image_layers=unlocked)
    model = tiny_model(config, word_tokenizer(), independent=True)
    lock_layers(model, config)
    image = {name for name in learning(model) if name.startswith("image.")}
    layers = {n for n in range(3) if any(f"resblocks.{n}." in name for name in image)}
    assert layers == set(range(3 - unlocked, 3))
    assert ("image.trunk.ln_post.weight" in image) == ("image.head.weight" in image) == (unlocked > 0)
    assert "image.independent_head.weight" in image
    assert "image.trunk.conv1.weight" not in image
    assert {name for name, _ in model.named_parameters() if name.startswith("text.")} <= learning(model)
    assert "logit_scale" in learning(model)


@pytest.mark.parametrize("architecture", ["clip", "bert"])
def test_a_text_tower_is_locked_whole(architecture):
    config = dataclasses.replace(three_layers(), unlocked_text_layers=0)
    config.text.architecture = architecture
    model = tiny_model(config, word_tokenizer())
    lock_layers(model, config)
    assert not any(name.startswith("text.") for name in learning(model))


def test_what_cannot_be_locked_is_refused_by_name(tmp_path):
    register_architectures(tmp_path)
    config = three_layers(unlocked_image_layers=4)
    with pytest.raises(ValueError, match=r"model.unlocked_image_layers = 4: at most 3"):
        lock_layers(tiny_model(config, word_tokenizer()), config)
    config = tiny_config(name="tiny-resnet", unlocked_image_layers=1)
    with pytest.raises(ValueError, match=r"unlocked_image_layers = 1: BatchNorm.*; give null"):
        lock_layers(tiny_model(config, word_tokenizer()), config)
    with pytest.raises(ValueError, match=r"model.unlocked_text_layers = -1: 0 or more"):
        three_layers(unlocked_text_layers=-1)


@pytest.mark.parametrize("name", [None, "tiny-resnet", "tiny-timm"])
def test_a_layers_rate_falls_with_each_layer_after_it(tmp_path, name):
    register_architectures(tmp_path)
    model = tiny_model(three_layers() if name is None else tiny_config(name=name), clip_tokenizer())
    factors, known = rate_factors(model, 0.5), places(model)
    for weight, factor in factors.items():
        assert factor == 0.5 ** (known[weight].layers + 1 - known[weight].layer)
    assert {f.split(".")[0] for f in factors} == {"image", "text"}
    assert not any("head" in weight.split(".")[1] or weight == "logit_scale" for weight in factors)
    groups = parameter_groups(model, OptimizerConfig(layer_decay=0.5))
    rates = {id(p): group["rate_factor"] for group in groups for p in group["params"]}
    assert len({group["name"] for group in groups}) == len(groups)
    for weight, parameter in model.named_parameters():
        assert rates[id(parameter)] == factors.get(weight, 1.0)


def test_without_decay_there_are_the_two_groups_of_older_checkpoints():
    groups = parameter_groups(tiny_model(three_layers(), word_tokenizer()), OptimizerConfig())
    assert [(group["name"], group["rate_factor"]) for group in groups] == [("decay", 1.0), ("no_decay", 1.0)]


def test_a_tower_whose_layers_are_unknown_is_refused_by_name():
    """Stages count their blocks anew."""

    def stage():
        return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))})

    model = tiny_model(three_layers(), word_tokenizer())
    model.image["trunk"] = torch.nn.ModuleDict({"stages": torch.nn.ModuleList(stage() for _ in range(2))})
    with pytest.raises(
        ValueError, match=r"optimizer.layer_decay = 0.5: the layers of the image tower are not known; give 1"
    ):
        rate_factors(model, 0.5)
