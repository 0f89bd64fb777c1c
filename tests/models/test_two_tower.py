"""The two towers: what their embeddings are, and what may not change them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import (
    CAPTIONS,
    batch_of_both_views,
    clip_tokenizer,
    random_images,
    register_architectures,
    tiny_config,
    tiny_model,
    word_tokenizer,
)
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.transforms import v2

from modstruct.config import ViewsConfig
from modstruct.models.two_tower import TwoTower

TEXT_TOWERS = ("clip", "bert")


@pytest.fixture(params=TEXT_TOWERS)
def architecture(request) -> str:
    return request.param


def same_weights_for_other_contexts(architecture: str, *context_lengths: int) -> list:
    """Models that differ in the number of positions alone, the shorter ones holding the first of the longest."""
    longest = tiny_model(tiny_config(architecture), word_tokenizer(max(context_lengths))).eval()
    models = []
    for length in context_lengths:
        model = tiny_model(tiny_config(architecture), word_tokenizer(length), seed=1).eval()
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        model.load_state_dict({n: v[: s[0]] if (s := shapes[n]) else v for n, v in longest.state_dict().items()})
        models.append(model)
    return models


def test_embeddings_are_float32_and_of_unit_norm_whatever_the_towers_compute_in(architecture):
    tokenizer = word_tokenizer()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(tiny_config(architecture), tokenizer, independent=True).to(dtype)
        embeddings = model(batch_of_both_views(tokenizer))
        kinds = [
            f"{m}{kind}{view}"
            for m in ("image", "text")
            for kind in ("", "_independent")
            for view in ("", "_augmented")
        ]
        assert set(embeddings) == {"logit_scale", *kinds}
        assert embeddings.pop("logit_scale").dtype == torch.float32
        for name, rows in embeddings.items():
            assert rows.shape == (len(CAPTIONS), model.embed_dim), name
            assert rows.dtype == torch.float32, name
            assert_close(rows.norm(dim=-1), torch.ones(len(rows)), msg=name)


def test_a_batch_gives_the_fields_it_allows():
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(), tokenizer)
    both = batch_of_both_views(tokenizer)
    for keys in (["image"], ["text"], ["image", "text"], ["image", "text", "image_augmented"], list(both)):
        assert set(model({key: both[key] for key in keys})) == {*keys, "logit_scale"}


def test_one_modality_alone_is_embedded_as_beside_the_other(architecture):
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(architecture), tokenizer, independent=True)
    both = batch_of_both_views(tokenizer)
    together = model(both)
    alone = model({"image": both["image"]}) | model({"text": both["text"]})
    for name in ("image", "text", "image_independent", "text_independent"):
        assert_close(alone[name], together[name])


def test_views_embedded_in_one_pass_are_those_embedded_apart(architecture):
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(architecture), tokenizer, independent=True)
    both = batch_of_both_views(tokenizer)
    together = model(both)
    apart = model({"image": both["image_augmented"], "text": both["text_augmented"]})
    for name, rows in apart.items():
        assert_close(rows, together[f"{name}_augmented" if name != "logit_scale" else name])


def test_heads_of_independent_embeddings_exist_only_if_asked(architecture):
    tokenizer = word_tokenizer()
    plain = tiny_model(tiny_config(architecture), tokenizer)
    assert not [name for name, _ in plain.named_parameters() if "independent" in name]
    with_heads = tiny_model(tiny_config(architecture), tokenizer, independent=True)
    extra = dict(with_heads.named_parameters()).keys() - dict(plain.named_parameters()).keys()
    assert extra == {"image.independent_head.weight", "text.independent_head.weight"}
    embeddings = with_heads(batch_of_both_views(tokenizer))
    for name in ("image", "text"):
        assert (embeddings[name] - embeddings[f"{name}_independent"]).norm(dim=-1).min() > 0.1


def test_independent_heads_leave_the_shared_weights_of_a_seed_as_they_are(architecture):
    """So that two methods compared at one seed start from one point."""
    plain = tiny_model(tiny_config(architecture), word_tokenizer()).state_dict()
    with_heads = tiny_model(tiny_config(architecture), word_tokenizer(), independent=True).state_dict()
    for name, value in plain.items():
        assert torch.equal(value, with_heads[name]), name


def test_a_seed_decides_the_weights(architecture):
    first, again, other = (
        tiny_model(tiny_config(architecture), word_tokenizer(), True, seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image.trunk.conv1.weight"], other["image.trunk.conv1.weight"])


def test_padding_changes_no_text_embedding(architecture):
    lengths = (10, 14, 23)
    models = same_weights_for_other_contexts(architecture, *lengths)
    rows = [
        model({"text": word_tokenizer(length)(CAPTIONS)})["text"] for model, length in zip(models, lengths, strict=True)
    ]
    for other in rows[1:]:
        assert_close(other, rows[0], atol=1e-5, rtol=0)


def test_what_the_padding_row_holds_does_not_matter(architecture):
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(architecture), tokenizer)
    before = model({"text": tokenizer(CAPTIONS)})["text"]
    trunk = model.text["trunk"]
    rows = trunk.token_embedding if architecture == "clip" else trunk.bert.embeddings.word_embeddings
    with torch.no_grad():
        rows.weight[tokenizer.padding_id] = 5.0
    assert_close(model({"text": tokenizer(CAPTIONS)})["text"], before)


def test_text_is_pooled_at_its_end_token(architecture):
    """The embedding hangs on the end token itself, and on each token before it."""
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(architecture), tokenizer)
    ids = tokenizer(["a red square"])
    before = model({"text": ids})["text"]
    end = int((ids[0] == tokenizer.end_id).nonzero())
    for position in range(1, end):
        changed = ids.clone()
        changed[0, position] = tokenizer(["star"])[0, 1]
        assert (model({"text": changed})["text"] - before).norm() > 1e-4, position
    trunk = model.text["trunk"]
    if architecture == "clip":
        after = ids.clone()
        after[0, end + 1 :] = tokenizer(["star"])[0, 1]
        assert_close(model({"text": after})["text"], before)
    else:
        tokens = trunk.bert(input_ids=ids, attention_mask=tokenizer.mask(ids).long()).last_hidden_state
        assert_close(trunk(ids), tokens[:, end])


@pytest.mark.parametrize(("log_scale", "expected"), [(-3.0, 1.0), (0.5, math.exp(0.5)), (50.0, math.exp(2.0))])
def test_the_logit_scale_is_clamped_in_the_forward(log_scale, expected):
    model = tiny_model(tiny_config(logit_scale_init=1.0, logit_scale_max=2.0), word_tokenizer())
    with torch.no_grad():
        model.logit_scale.fill_(log_scale)
    assert_close(model({})["logit_scale"], torch.tensor([expected]))
    assert model.logit_scale.item() == log_scale


def test_the_logit_scale_starts_where_the_recipe_says():
    model = tiny_model(tiny_config(logit_scale_init=math.log(1 / 0.07)), word_tokenizer())
    assert model.logit_scale.shape == (1,)
    assert_close(model({})["logit_scale"], torch.tensor([1 / 0.07]))


def test_every_trained_parameter_gets_a_gradient(architecture):
    """ZeRO waits for a gradient of every parameter, on every process."""
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(architecture), tokenizer, independent=True)
    generator = torch.Generator().manual_seed(0)
    embeddings = model(batch_of_both_views(tokenizer)).values()
    sum((rows * torch.randn(rows.shape, generator=generator)).sum() for rows in embeddings).backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]
    still = [name for name, value in model.named_parameters() if not value.grad.any()]
    assert not still


def test_pixels_are_normalised_as_torchvision_does():
    model = tiny_model(tiny_config(), word_tokenizer())
    views = ViewsConfig()
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(views.mean, views.std)])
    assert_close(model.normalize(random_images()), expected(random_images()))
    assert model.bfloat16().normalize(random_images()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_what_the_shared_head_takes(architecture, dtype):
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(architecture), tokenizer, independent=True).to(dtype).eval()
    batch = batch_of_both_views(tokenizer)
    made, plain = model(batch, features=True), model(batch)
    added = {f"{name}_{kind}" for name in ("image", "text") for kind in ("features", "projected")}
    assert made.keys() - plain.keys() == added
    assert all(torch.equal(made[name], plain[name]) for name in plain)
    for name, tower in (("image", model.image), ("text", model.text)):
        features = made[f"{name}_features"]
        assert features.dtype == torch.float32
        assert_close(F.normalize(tower["head"](features.to(dtype)).float(), dim=-1), plain[name])
        assert torch.equal(F.normalize(made[f"{name}_projected"], dim=-1), plain[name])


def test_features_of_a_tower_that_projects_inside_its_pooling_are_the_pooled_output(tmp_path):
    register_architectures(tmp_path)
    for independent_head in ("attention_pool", "linear"):
        config = tiny_config(name="tiny-resnet", independent_head=independent_head)
        model = tiny_model(config, word_tokenizer(), independent=True).eval()
        made = model({"image": random_images(64)}, features=True)
        assert made["image_features"].shape == (len(CAPTIONS), 8)
        assert_close(F.normalize(made["image_features"], dim=-1), made["image"])


def dropping(rate: float) -> tuple[TwoTower, TwoTower, list[int]]:
    """A model that drops patches, its twin that does not, and how many tokens the former's first layer saw."""
    config = tiny_config()
    config.vision.patch_size = 4
    model, twin = (tiny_model(config, word_tokenizer()) for _ in range(2))
    model.drop_patches(rate)
    seen: list[int] = []
    model.image["trunk"].transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    return model, twin, seen


def test_patches_are_left_out_by_each_images_own_seed_and_only_where_a_batch_has_seeds():
    model, twin, seen = dropping(0.3)
    assert model.batch_fields == twin.batch_fields | {"patch_seed"}
    images = {"image": random_images(), "image_augmented": random_images()}
    seeds = torch.tensor([5, 2**63 - 1, 0, 7])
    assert torch.equal(model(images)["image"], twin(images)["image"])
    made = model(images | {"patch_seed": seeds})
    assert seen == [17, 12]
    assert not torch.allclose(made["image"], twin(images)["image"])
    assert not torch.allclose(made["image"], made["image_augmented"])  # the same images, each view with a draw
    order = torch.tensor([2, 0, 3, 1])
    again = model({name: rows[order] for name, rows in (images | {"patch_seed": seeds}).items()})
    assert_close(again["image"], made["image"][order])
    assert torch.equal(model(images)["image"], twin(images)["image"])


def test_every_patch_is_kept_equally_often():
    model, _, _ = dropping(0.75)
    dropout = model.patch_dropout
    dropout.seeds = torch.arange(4000)
    tokens = torch.arange(17.0).expand(4000, 17)[:, :, None]
    kept = dropout(tokens).squeeze(-1).long()
    assert kept.shape == (4000, 5)
    counts = torch.bincount(kept.flatten(), minlength=17)
    assert counts[0] == 4000
    assert (counts[1:] - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert all(len(set(row)) == 5 for row in kept.tolist())


def test_dropping_patches_of_a_resnet_is_refused_by_name(tmp_path):
    register_architectures(tmp_path)
    with pytest.raises(ValueError, match=r"train.patch_dropout = 0.5: 0: the image tower is no ViT of open_clip's"):
        tiny_model(tiny_config(name="tiny-resnet"), clip_tokenizer()).drop_patches(0.5)
