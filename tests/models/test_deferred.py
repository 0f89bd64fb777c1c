"""Models made without the memory of their large tensors have the numbers of those that are made plainly."""

from __future__ import annotations

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import clip_tokenizer, register_architectures, tiny_config, tiny_model, word_tokenizer
from torch import nn

from modstruct.config import ModelConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.models.deferred import Deferred


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory) -> None:
    register_architectures(tmp_path_factory.mktemp("architectures"))


def assert_as_made_plainly(config: ModelConfig, tokenizer: Tokenizer) -> None:
    plain = tiny_model(config, tokenizer, independent=True).state_dict()
    after = torch.rand(3)
    with Deferred(small=8) as deferred:
        model = tiny_model(config, tokenizer, independent=True)
        assert torch.equal(torch.rand(3), after)  # what is drawn later is drawn as it was
    found = model.state_dict()
    assert all(value.is_meta == (value.numel() >= 8) for value in found.values() if value.is_floating_point())
    assert found.keys() == plain.keys()
    for name in reversed(list(found)):  # in any order
        assert torch.equal(deferred.value(found[name]), plain[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "bert"},
        {"stem": "conv"},
        {"name": "tiny-timm"},
        {"name": "tiny-resnet", "independent_head": "attention_pool"},
    ],
    ids=str,
)
def test_every_tower_has_the_numbers_that_it_has_when_made_plainly(changes):
    assert_as_made_plainly(tiny_config(**changes), word_tokenizer())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_pretrained_weights_are_read_when_they_are_asked_for(tmp_path, ending):
    """The text tower's positions are cut, its vocabulary grows, its projection is turned."""
    torch.manual_seed(5)
    weights = open_clip.create_model("tiny-vit").state_dict()
    path = tmp_path / f"weights.{ending}"
    save_file(weights, path) if ending == "safetensors" else torch.save(weights, path)
    assert_as_made_plainly(tiny_config(name="tiny-vit", pretrained=str(path)), clip_tokenizer(8))


def test_what_is_read_changed_or_copied_on_the_way_is_what_it_was_then():
    def make() -> tuple[list[torch.Tensor], list[float]]:
        torch.manual_seed(3)
        table, small = torch.randn(10, 10), torch.arange(5.0)
        before = table.clone()
        table[2:4, :5] = small  # which changes afterwards
        small.zero_()
        turned = table.T.contiguous() @ table
        table.mul_(2)
        table[0] = before[1].flip(0)
        table[1], table[torch.arange(9)[:3], 2] = 4.0, 3
        layer = nn.Linear(10, 10)
        nn.init.trunc_normal_(layer.weight, std=0.1)
        with torch.no_grad():
            layer.weight[3].zero_()
            small += turned[0, :5]
        drawn = torch.rand_like(table) + torch.randperm(100).view(10, 10)
        return [table, before, turned, layer.weight, layer.bias, drawn, small], [
            float(table.sum()),
            turned[1, 1].item(),
        ]

    right, numbers = make()
    with Deferred(small=8) as deferred:
        made, found = make()
    assert found == numbers
    assert [tensor.is_meta for tensor in made] == [True] * 6 + [False]
    for tensor, expected in zip(made, right, strict=True):
        assert torch.equal(deferred.value(tensor), expected)


def test_what_takes_no_memory_is_not_made():
    """A model of 30 TB, and no number of it."""
    with Deferred() as deferred:
        table = nn.Embedding(10**9, 10**4, _weight=torch.empty(10**9, 10**4))
        small = nn.Linear(8, 8)
    assert table.weight.is_meta
    assert deferred.value(small.weight) is small.weight
