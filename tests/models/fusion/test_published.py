"""ALBEF's published files: names both ways, the forward pass that its weights make, and runs that start from them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from albef_names import COPIED, PlainAlbef, Sizes, albef_weights
from safetensors.torch import load_file, save_file
from tiny_fusion import albef_losses, fusion_recipe, training_batch
from tiny_models import word_tokenizer
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM
from whole_checkpoint import Whole
from whole_checkpoint import write as write_whole

from modstruct import checkpoints
from modstruct.config import SeparationConfig
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model, initial_tokenizer
from modstruct.models.fusion.backbone import interpolate_positions
from modstruct.models.fusion.initial_weights import read_everything
from modstruct.models.fusion.published import from_albef, to_albef
from modstruct.training.export import export

SIZES = Sizes()
convert = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "convert_albef.py"))["main"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_same(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        # The temperature goes through a logarithm.
        assert torch.equal(found[name], value) or (name in ("temp", "logit_scale")), name
        torch.testing.assert_close(found[name], value)


@pytest.fixture
def published(tmp_path):
    weights = albef_weights(SIZES)
    path = tmp_path / "ALBEF.pth"
    torch.save({"model": weights, "epoch": 29}, path)
    return path, weights


def model_from(init, tokenizer=None, **fusion):
    recipe = fusion_recipe(init=str(init), **fusion)
    torch.manual_seed(7)
    return build_model(recipe, tokenizer or word_tokenizer(), build_objective(recipe.losses))


def test_names_round_trip():
    weights = albef_weights(SIZES)
    ours = from_albef(weights)
    assert_same(to_albef(ours), weights)
    assert ours["queue.counts"].tolist() == [4, 10]


def test_ours_round_trip_but_for_what_albef_has_no_place_for(tmp_path):
    recipe = fusion_recipe(independent=True)
    model = build_model(recipe, word_tokenizer(), build_objective(recipe.losses))
    model.queue.push(torch.rand(11, 8), torch.rand(11, 8), torch.arange(11))
    everything = model.state_dict() | model.ema_state_dict()
    back = from_albef(to_albef(everything))
    lost = everything.keys() - back.keys()
    assert lost == {
        *(f"{copy}{m}_independent_head.weight" for copy in ("", "momentum.") for m in ("image", "text")),
        "momentum.logit_scale",
        "momentum.matching_head.weight",
        "momentum.matching_head.bias",
    }
    assert_same(
        {n: v for n, v in back.items() if n != "queue.ids"},
        {n: v for n, v in everything.items() if n not in lost and n != "queue.ids"},
    )


def test_a_queue_that_is_not_full_is_filled_with_unit_vectors():
    recipe = fusion_recipe()
    model = build_model(recipe, word_tokenizer(), build_objective(recipe.losses))
    model.queue.push(*(F.normalize(torch.rand(4, 8), dim=1) for _ in range(2)), torch.arange(4))
    theirs = to_albef(model.state_dict() | model.ema_state_dict())
    torch.testing.assert_close(theirs["image_queue"].norm(dim=0), torch.ones(10))
    assert torch.equal(theirs["image_queue"][:, :4], model.queue.image[:4].T)
    assert theirs["queue_ptr"].tolist() == [4]


def test_files_round_trip_through_the_tool(published, tmp_path, capsys):
    path, weights = published
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert convert(["--to", "ours", "--weights", str(path), "--out", str(ours)]) == 0
    assert convert(["--to", "albef", "--weights", str(ours), "--out", str(back)]) == 0
    assert "numbers: " in capsys.readouterr().out
    content = torch.load(back, weights_only=True)
    assert content.keys() == {"model"}
    assert_same(content["model"], weights)
    assert_same(load_file(ours), from_albef(weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "ours", "--out", "x.pth"], r"--out = 'x\.pth': must end in \.safetensors"),
        (["--to", "albef", "--out", "no/x.pth"], r"--out = 'no/x\.pth': make the folder no first"),
        (["--to", "albef", "--weights", "nothing", "--out", "x.pth"], r"--weights = 'nothing': no such file or folder"),
    ],
)
def test_what_the_tool_refuses(published, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    weights = [] if "--weights" in arguments else ["--weights", str(published[0])]
    assert convert([*arguments, *weights]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)


def test_the_tool_overwrites_nothing(published, tmp_path, capsys):
    (tmp_path / "there.pth").touch()
    assert convert(["--to", "albef", "--weights", str(published[0]), "--out", str(tmp_path / "there.pth")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_other_weights_have_no_counterpart(tmp_path, capsys):
    save_file({"image.trunk.weight": torch.ones(1)}, tmp_path / "towers.safetensors")
    arguments = ["--weights", str(tmp_path / "towers.safetensors"), "--out", str(tmp_path / "x.pth")]
    assert convert(["--to", "albef", *arguments]) == 2
    assert "weights = 'image.trunk.weight': no such weight in ALBEF's" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"ALBEF's weights = 'text_decoder\.x': no such weight"):
        from_albef(albef_weights(SIZES) | {"text_decoder.x": torch.ones(1)})


def test_the_forward_pass_is_albef_s(published):
    path, weights = published
    model = model_from(path).eval()
    batch = training_batch(rows=6)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.backbone.mean, model.backbone.std))
    pixels = (batch["image"].double() / 255 - mean) / std
    mask = batch["text"] != word_tokenizer().padding_id
    batch["text_masked"][0, 1] = word_tokenizer().padding_id  # a word replaced by padding is seen nevertheless
    with torch.no_grad():
        made = model(batch)
    places = batch["masked_labels"] != -100
    assert mask.sum() < mask.numel()
    torch.testing.assert_close(made["logit_scale"], torch.tensor([20.0]))
    for copy, ending in (("", ""), ("_m", "_augmented")):
        plain = PlainAlbef(weights, SIZES, copy)
        image, text = plain.image(pixels), plain.text(batch["text"], mask)
        torch.testing.assert_close(made[f"image{ending}"].double(), plain.embed(image, "vision_proj"), **CLOSE)
        torch.testing.assert_close(made[f"text{ending}"].double(), plain.embed(text, "text_proj"), **CLOSE)
        filled = plain.fill(batch["text_masked"], mask, image)[places]
        name = "masked_logits" + ("_ema" if copy else "")
        torch.testing.assert_close(made[name].double(), filled, rtol=1e-5, atol=1e-4)
    plain = PlainAlbef(weights, SIZES)
    image, text = plain.image(pixels), plain.text(batch["text"], mask)
    found = model.backbone.encode_text(batch["text"]).detach()
    torch.testing.assert_close(found[mask].double(), text[mask], **CLOSE)
    torch.testing.assert_close(model.backbone.encode_image(batch["image"]).detach().double(), image, **CLOSE)
    right = plain.match(text, mask, image)
    torch.testing.assert_close(made["matching_logits"][:6].double(), right, **CLOSE)


def test_the_queue_and_ema_weights_come_with_the_weights(published):
    model = model_from(published[0])
    assert model.queue.filled == 10
    assert torch.equal(model.queue.image, published[1]["image_queue"].T)
    momentum = model.ema.module
    assert torch.equal(momentum.image_head.weight, published[1]["vision_proj_m.weight"])
    assert torch.equal(momentum.matching_head.weight, published[1]["itm_head.weight"])
    total, _ = build_objective(albef_losses())(model(training_batch()), 0)
    assert total.isfinite()


def test_a_queue_of_another_size_starts_empty(published):
    assert model_from(published[0], queue=12).queue.filled == 0


def test_missing_ema_weights_start_from_the_weights(tmp_path):
    weights = {n: v for n, v in albef_weights(SIZES).items() if n.split(".")[0] not in {f"{c}_m" for c in COPIED}}
    torch.save(weights, tmp_path / "plain.pth")
    model = model_from(tmp_path / "plain.pth")
    theirs = dict(model.ema.module.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in model.named_parameters())


def test_heads_that_albef_lacks_keep_their_initialisation(published):
    recipe = fusion_recipe(init=str(published[0]), losses=albef_losses(separation=SeparationConfig(weight=1.0)))
    model = build_model(recipe, word_tokenizer(), build_objective(recipe.losses))
    copy = model.ema.module.image_independent_head.weight
    assert torch.equal(model.image_independent_head.weight, copy)


def test_positions_fit_another_resolution_and_context(published):
    path, weights = published
    tokenizer = word_tokenizer(context_length=10)
    model = model_from(path, tokenizer, vision={"image_size": 32})
    found = model.backbone.words.position_embeddings.weight
    assert torch.equal(found, weights["text_encoder.bert.embeddings.position_embeddings.weight"][:10])
    for copy, own in (("", model), ("_m", model.ema.module)):
        given = weights[f"visual_encoder{copy}.pos_embed"]
        right = bicubic(given, 4)
        torch.testing.assert_close(own.backbone.image.pos_embed.detach(), right)
        assert torch.equal(own.backbone.image.pos_embed[:, 0], given[:, 0])


def bicubic(positions: torch.Tensor, side: int) -> torch.Tensor:
    """As ALBEF's code interpolates: torch's bicubic, corners not aligned, the class token kept."""
    grid = positions[:, 1:].unflatten(1, (int((positions.shape[1] - 1) ** 0.5), -1)).permute(0, 3, 1, 2)
    fitted = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], fitted.flatten(2).mT], dim=1)


@pytest.mark.parametrize("side", [2, 3, 5])
def test_positions_are_interpolated_as_albef_does(side):
    model = build_model(fusion_recipe(), word_tokenizer(), build_objective(albef_losses()))  # a grid of 2 x 2
    positions = torch.randn(1, 1 + side**2, 16)
    torch.testing.assert_close(interpolate_positions(positions, model.backbone.image), bicubic(positions, 2))


@pytest.mark.parametrize(
    ("fusion", "differs"),
    [
        ({"embed_dim": 9}, "image_head"),
        ({"text": {"width": 14}}, "backbone.fusion.layer"),
        ({"text": {"text_layers": 2, "fusion_layers": 1}}, "backbone.fusion.layer"),
        ({"text": {"fusion_layers": 3}}, "backbone.fusion.layer.3"),
        ({"vision": {"layers": 3}}, "backbone.image.blocks.2"),
    ],
)
def test_weights_of_another_model_are_refused(published, fusion, differs):
    with pytest.raises(ValueError, match=rf"fusion\.init = '.*ALBEF\.pth': belongs to another model.*{differs}"):
        model_from(published[0], **fusion)


def test_no_such_file_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"fusion\.init = 'nothing\.pth': no such file or folder; give a run"):
        model_from("nothing.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"fusion\.init = '.*empty': is no checkpoint"):
        model_from(tmp_path / "empty")


def test_a_two_tower_run_is_called_one():
    with pytest.raises(ValueError, match=r"^fusion\.init = .*: a model of framework two_tower; .* fusion$"):
        model_from(Path(__file__).parents[2] / "checkpoints" / "written_by_0.1.0" / "two_tower")


def test_a_checkpoint_a_run_and_an_export_of_ours_are_starts(tmp_path):
    recipe = fusion_recipe(independent=True)
    model = build_model(recipe, word_tokenizer(), build_objective(recipe.losses))
    with torch.no_grad():
        model.ema.module.image_head.weight.add_(1)
    model.queue.push(torch.rand(3, 8), torch.rand(3, 8), torch.arange(3))
    saved = Whole(
        dict(model.state_dict()),
        {},
        {},
        checkpoints.TrainState(),
        {"step": 1},
        recipe_to_dict(recipe),
        model.ema_state_dict(),
    )
    checkpoint = checkpoints.step_folder(tmp_path / "run", 1)
    write_whole(checkpoint, saved, word_tokenizer())
    exported = export(tmp_path / "export", dict(model.state_dict()), {}, recipe, word_tokenizer(), 2)
    for init in (checkpoint, tmp_path / "run", exported):
        started = model_from(init)
        for name, value in started.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name])
        of_ema = torch.equal(started.ema.module.image_head.weight, model.ema.module.image_head.weight)
        assert of_ema == (init != exported)
        assert started.queue.filled == (0 if init == exported else 3)
        assert initial_tokenizer(fusion_recipe(init=str(init))).model == word_tokenizer().model
        theirs = tmp_path / f"{init.name}.pth"
        assert convert(["--to", "albef", "--weights", str(init), "--out", str(theirs)]) == 0
        assert_same(to_albef(read_everything(str(init), "x")), torch.load(theirs, weights_only=True)["model"])
        model_from(theirs)


def test_a_bert_starts_text_and_fusion_layers(tmp_path):
    tokenizer = word_tokenizer()
    described = {"vocab_size": 13, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(**described, intermediate_size=48, max_position_embeddings=20))
    weights = {name: value.contiguous().clone() for name, value in bert.state_dict().items()}
    save_file(weights, tmp_path / "bert.safetensors")
    recipe = fusion_recipe(text={"pretrained": str(tmp_path / "bert.safetensors")})
    model = build_model(recipe, tokenizer, build_objective(recipe.losses)).eval()
    ids = tokenizer(["a red square"])
    mask = ids != tokenizer.padding_id
    with torch.no_grad():
        # One text layer of three: what BERT makes of it after its first layer.
        right = bert.eval().bert(ids, mask.long(), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(model.backbone.encode_text(ids)[mask], right[mask], **CLOSE)
    last = model.backbone.fusion.layer["2"].output.dense.weight
    assert torch.equal(last, weights["bert.encoder.layer.2.output.dense.weight"])
    save_file(weights | {"bert.encoder.layer.0.output.dense.bias": torch.ones(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(
        ValueError, match=r"fusion\.text\.pretrained = '.*wrong.*': belongs to another BERT.*text\.layer\.0"
    ):
        build_model(
            fusion_recipe(text={"pretrained": str(tmp_path / "wrong.safetensors")}),
            tokenizer,
            build_objective(recipe.losses),
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("queue_ptr", "image_queue and text_queue"), ("text_encoder.bert.encoder.layer.x.output.dense.bias", "number")],
)
def test_a_file_of_albefs_that_is_not_whole_is_refused(name, reason):
    weights = {"visual_encoder.pos_embed": torch.zeros(1, 5, 4), name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"ALBEF's weights = '{name}': .*{reason}"):
        from_albef(weights, text_layers=1)
