"""The fusion model: what a batch becomes, and what must not change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_engine import PlainEngine
from tiny_fusion import albef_losses, fusion_model, fusion_recipe, training_batch
from tiny_models import word_tokenizer

from modstruct.config import (
    ContrastiveConfig,
    GeometryConfig,
    LossesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    QueueContrastConfig,
)
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model, recompute_activations
from modstruct.models.fusion.pretraining import IGNORED
from modstruct.training.gradient_cache import embed

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def padded(model, batch, columns=12):
    """The same batch with fewer columns of padding: what is cut off is padding in every row."""
    cut = {name: rows[:, :columns] if rows.dim() == 2 else rows for name, rows in batch.items()}
    assert (batch["text"][:, columns:] == model.backbone.padding_id).all()
    return cut


@pytest.mark.parametrize("in_modal", [False, True])
def test_padding_changes_nothing(in_modal):
    model = fusion_model(in_modal_recipe() if in_modal else fusion_recipe())
    batch = training_batch(rows=6)
    short = padded(model, batch, columns=9)
    with torch.no_grad():
        long, brief = model(batch), model(short)
        assert long.keys() == brief.keys()
        for name, value in long.items():
            # Text of another length is rounded otherwise, and narrow LayerNorms make that larger: 6e-5 on an AMD EPYC,
            # where all that is float64 in a float64 model was equal.
            near = {"rtol": 0.0, "atol": 3e-4} if name == "masked_logits_ema" else CLOSE
            torch.testing.assert_close(value, brief[name], **near, msg=lambda m, n=name: f"{n}: {m}")
        mask = model.backbone.mask(short["text"])
        text, text_brief = model.backbone.encode_text(batch["text"]), model.backbone.encode_text(short["text"])
        torch.testing.assert_close(text[:, :9][mask], text_brief[mask], **CLOSE)
        image = model.backbone.encode_image(batch["image"])
        fused = model.backbone.fuse(text, model.backbone.mask(batch["text"]), image)
        fused_brief = model.backbone.fuse(text_brief, mask, image)
        torch.testing.assert_close(fused[:, :9][mask], fused_brief[mask], **CLOSE)


def test_what_stands_in_the_padding_changes_nothing():
    """Not even where a row's text tokens are spoiled after the text encoder."""
    model = fusion_model()
    batch = training_batch()
    mask = model.backbone.mask(batch["text"])
    with torch.no_grad():
        text, image = model.backbone.encode_text(batch["text"]), model.backbone.encode_image(batch["image"])
        spoiled = torch.where(mask[..., None], text, torch.full_like(text, 30.0))
        torch.testing.assert_close(model.match(text, mask, image), model.match(spoiled, mask, image), **CLOSE)


def test_masked_image_tokens_change_nothing():
    model = fusion_model()
    batch = training_batch()
    mask = model.backbone.mask(batch["text"])
    with torch.no_grad():
        text, image = model.backbone.encode_text(batch["text"]), model.backbone.encode_image(batch["image"])
        more = torch.cat([image, torch.full_like(image, 9.0)], dim=1)
        seen = torch.arange(more.shape[1])[None].expand(len(more), -1) < image.shape[1]
        torch.testing.assert_close(
            model.backbone.fuse(text, mask, more, seen), model.backbone.fuse(text, mask, image), **CLOSE
        )


def test_a_row_does_not_depend_on_the_others():
    model = fusion_model(fusion_recipe(losses=replace(albef_losses(), matching=MatchingConfig(weight=0.0))))
    batch = training_batch()
    with torch.no_grad():
        together = model(batch)
        for row in range(6):
            alone = model({name: rows[row : row + 1] for name, rows in batch.items()})
            for name in ("image", "text", "image_augmented", "text_augmented"):
                torch.testing.assert_close(alone[name][0], together[name][row], **CLOSE)


def test_a_left_out_modality_is_left_out():
    model = fusion_model(fusion_recipe(independent=True))
    batch = training_batch()
    with torch.no_grad():
        both = model({"image": batch["image"], "text": batch["text"]})
        image, text = model({"image": batch["image"]}), model({"text": batch["text"]})
    assert image.keys() == {"logit_scale", "image", "image_independent"}
    assert text.keys() == {"logit_scale", "text", "text_independent"}
    assert both.keys() == image.keys() | text.keys()
    for name, value in (image | text).items():
        torch.testing.assert_close(value, both[name], **CLOSE)
    assert model({}).keys() == {"logit_scale"}


def test_embeddings_are_of_unit_norm_and_float32():
    model = fusion_model(fusion_recipe(independent=True)).to(torch.bfloat16)
    with torch.no_grad():
        made = model(training_batch())
    for name, value in made.items():
        if value.is_floating_point():
            assert value.dtype == torch.float32, name
        if name.startswith(("image", "text")) and "queue" not in name:
            torch.testing.assert_close(value.norm(dim=1), torch.ones(6))


def test_shared_weights_do_not_depend_on_independent_heads():
    plain, with_heads = (build(independent) for independent in (False, True))
    more = with_heads.state_dict().keys() - plain.state_dict().keys()
    assert more == {"image_independent_head.weight", "text_independent_head.weight"}
    assert all(torch.equal(value, with_heads.state_dict()[name]) for name, value in plain.state_dict().items())


def build(independent: bool):
    recipe = fusion_recipe(independent=independent)
    torch.manual_seed(3)
    return build_model(recipe, word_tokenizer(), build_objective(recipe.losses))


def test_matching_rows_are_pairs_then_wrong_images_then_wrong_texts():
    model = fusion_model()
    batch = training_batch()
    with torch.no_grad():
        made = model(batch)
        text, image = model.backbone.encode_text(batch["text"]), model.backbone.encode_image(batch["image"])
        mask = model.backbone.mask(batch["text"])
        # Logits of every text with every image; each row of the outputs must be one of them.
        every = torch.stack([model.match(text, mask, image[[k]].expand_as(image)) for k in range(6)], dim=1)
    assert made["matching_labels"].tolist() == [1] * 6 + [0] * 12
    for row in range(6):
        positive, wrong_image, wrong_text = (made["matching_logits"][row + part * 6] for part in range(3))
        torch.testing.assert_close(positive, every[row, row], **CLOSE)
        others = [k for k in range(6) if batch["text_id"][k] != batch["text_id"][row]]
        assert any(torch.allclose(wrong_image, every[row, k], **CLOSE) for k in others)
        assert any(torch.allclose(wrong_text, every[k, row], **CLOSE) for k in others)


def test_one_pair_alone_has_no_negative_and_a_finite_loss():
    model = fusion_model()
    made = model(training_batch(rows=1))
    assert made["matching_labels"].tolist() == [1, IGNORED, IGNORED]
    total, _ = build_objective(albef_losses())(made, 0)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def in_modal_recipe(**others):
    contrast = QueueContrastConfig(weight=1.0, ramp_steps=0, in_modal=True)
    return fusion_recipe(losses=albef_losses(queue_contrast=contrast, **others))


@pytest.mark.parametrize("masks", [False, True])
def test_with_in_modal_contrast_the_ema_encoders_read_the_second_view_alone(masks):
    """Queues too, and nothing else: the model's own embeddings are the plain view's."""
    recipe = in_modal_recipe(masked_language=MaskedLanguageConfig(weight=float(masks), ramp_steps=0))
    model, batch = fusion_model(recipe), training_batch()
    with torch.no_grad():
        made = model(batch)
        second = {name: batch[f"{name}_augmented"] for name in ("image", "text")}
        view = model.ema_model(second)
        plain = model({name: batch[name] for name in ("image", "text")})
    for name in ("image", "text"):
        torch.testing.assert_close(made[f"{name}_augmented"], view[name], **CLOSE)
        torch.testing.assert_close(made[name], plain[name], **CLOSE)
        assert float((view[name] - plain[name]).norm(dim=1).min()) > 0.01
    model.update_ema(made, batch, step=0)
    assert torch.equal(model.queue.image[:6], made["image_augmented"])
    assert torch.equal(model.queue.text[:6], made["text_augmented"])


def test_without_it_they_read_the_plain_view():
    model, batch = fusion_model(), training_batch()
    with torch.no_grad():
        made = model({name: rows for name, rows in batch.items() if not name.endswith("_augmented")})
    for name in ("image", "text"):
        torch.testing.assert_close(made[f"{name}_augmented"], made[name], **CLOSE)


def test_in_modal_contrast_in_micro_batches_has_the_gradient_of_the_whole_batch():
    recipe = in_modal_recipe(geometry=GeometryConfig(weight=0.25))
    batch, objective, found = training_batch(), build_objective(recipe.losses), []
    for parts in ([batch], [{name: rows[start : start + 4] for name, rows in batch.items()} for start in (0, 4)]):
        engine = PlainEngine(fusion_model(recipe))
        embedded = embed(engine, parts, objective, 0)
        total, _ = objective(embedded.outputs, 0, without=embedded.deferred)
        embedded.backward(total)
        found.append({name: parameter.grad for name, parameter in engine.model.named_parameters()})
    largest = max(float(value.norm()) for value in found[0].values())
    for name, value in found[0].items():
        assert float((found[1][name] - value).norm()) <= 1e-5 * max(float(value.norm()), 1e-2 * largest), name


def test_every_parameter_gets_a_gradient():
    recipe = fusion_recipe(independent=True)
    model = fusion_model(recipe)
    total, _ = build_objective(recipe.losses)(model(training_batch()), 0)
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in model.ema.module.parameters())


@pytest.mark.parametrize("more", ["nothing", "matching", "masked_language"])
def test_what_no_loss_reaches_is_not_trained(more):
    """At ZeRO stages 1 and above its gradient would be 0, and weight decay would wear it away."""
    losses = replace(albef_losses(), contrastive=ContrastiveConfig(weight=1.0))
    for name in {"matching", "masked_language"} - {more}:
        getattr(losses, name).weight = 0.0
    model = fusion_model(fusion_recipe(losses=losses))
    total, _ = build_objective(losses)(model(training_batch()), 0)
    total.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("backbone.fusion") for name in trained) == (more != "nothing")


def test_what_no_loss_asks_for_is_not_made():
    off = LossesConfig(contrastive=ContrastiveConfig(weight=1.0))
    model = fusion_model(fusion_recipe(losses=off))
    assert not {name for name in model(training_batch()) if name.startswith(("matching", "masked"))}


def gradients(model, recipe) -> dict[str, torch.Tensor]:
    total, _ = build_objective(recipe.losses)(model(training_batch()), 0)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_recomputed_activations_give_the_same_gradients():
    recipe = fusion_recipe(independent=True)
    plain = gradients(fusion_model(recipe), recipe)
    model = fusion_model(recipe)
    recompute_activations(model)
    switched = [trunk for trunk in model.trunks().values() if trunk.grad_checkpointing]
    assert len(switched) == 3
    found = gradients(model, recipe)
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_dropout_falls_on_embeddings_as_where_they_are_made_alone():
    """As the gradient cache asks: the losses see the embeddings of its first pass, which makes nothing else."""
    model, batch = fusion_model(fusion_recipe(text={"dropout": 0.3})).train(), training_batch(rows=6)
    torch.manual_seed(1)
    alone = model(batch, embed_only=True)
    torch.manual_seed(1)
    whole = model(batch)
    for name in ("image", "text"):
        torch.testing.assert_close(whole[name], alone[name])
    assert not torch.equal(alone["text"], model(batch)["text"])


def test_bfloat16_takes_a_step_without_nan():
    recipe = fusion_recipe(independent=True)
    found = gradients(fusion_model(recipe).to(torch.bfloat16), recipe)
    assert all(value.isfinite().all() for value in found.values())


def test_the_temperature_stays_in_its_range():
    model = fusion_model(fusion_recipe(temperature_range=(0.05, 0.5)))
    for log_scale, right in ((9.0, 20.0), (-9.0, 2.0)):
        with torch.no_grad():
            model.logit_scale.fill_(log_scale)
        assert model({})["logit_scale"].item() == pytest.approx(right)


def refusal(message: str):
    return pytest.raises(ValueError, match=message)


def test_wrong_settings_are_refused_by_name(tmp_path):
    with refusal(r"fusion\.vision\.name = 'vit_no_such': not known to timm"):
        fusion_model(fusion_recipe(vision={"name": "vit_no_such"}))
    with refusal(r"fusion\.vision\.name = 'resnet18': timm cannot build it .* must be a ViT"):
        fusion_model(fusion_recipe(vision={"name": "resnet18"}))
    with refusal(r"fusion\.vision\.name = 'deit_tiny_distilled_patch16_224': .*must be a ViT with one class token"):
        fusion_model(fusion_recipe(vision={"name": "deit_tiny_distilled_patch16_224", "image_size": 32}))
    with refusal(r"fusion\.vision\.pretrained = 'a\.pth': needs fusion\.vision\.name"):
        fusion_recipe(vision={"pretrained": "a.pth"})
    with refusal(r"fusion\.text\.heads = 5: a divisor of fusion\.text\.width = 12"):
        fusion_recipe(text={"heads": 5})
    with refusal(r"fusion\.temperature_init = 0\.6: from 0\.001 to 0\.5"):
        fusion_recipe(temperature_init=0.6)
    missing = tmp_path / "bert.safetensors"
    missing.write_bytes(b"no weights")
    with refusal(r"fusion\.text\.pretrained = '.*bert\.safetensors': cannot be read"):
        fusion_model(fusion_recipe(text={"pretrained": str(missing)}))


def test_features_are_what_the_shared_heads_take():
    model = fusion_model().eval()
    whole = training_batch()
    batch = {name: whole[name] for name in ("image", "text")}
    made, plain = model(batch, features=True), model(batch)
    added = {f"{name}_{kind}" for name in ("image", "text") for kind in ("features", "projected")}
    assert made.keys() - plain.keys() == added
    assert all(torch.equal(made[name], plain[name]) for name in plain)
    for name, head in (("image", model.image_head), ("text", model.text_head)):
        embedded = torch.nn.functional.normalize(head(made[f"{name}_features"]), dim=-1)
        torch.testing.assert_close(embedded, plain[name])
        assert torch.equal(torch.nn.functional.normalize(made[f"{name}_projected"], dim=-1), plain[name])
