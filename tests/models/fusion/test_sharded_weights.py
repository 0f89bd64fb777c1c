"""EMA weights sharded over the processes compute, are averaged and are saved as whole ones."""

from __future__ import annotations

import pytest
import torch
from processes import run_on_processes
from tiny_answers import ANSWERS, answer_model, question_batch, with_answers
from tiny_fusion import fusion_model, fusion_recipe, training_batch
from torch import Tensor, nn

from modstruct import distributed
from modstruct.models.fusion.ema import ShardedWeights


def own_part(parameter: nn.Parameter) -> Tensor:
    """As ZeRO stage 3 has it, with anything after the end."""
    size = -(-parameter.numel() // distributed.world_size())
    padded = torch.cat([parameter.detach().flatten(), torch.full((size * distributed.world_size(),), float("nan"))])
    return padded[distributed.rank() * size :][:size]


def moved(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def pretraining():
    return fusion_model(fusion_recipe(independent=True, momentum=0.7)), training_batch()


def answering():
    return answer_model(), with_answers(question_batch(), ANSWERS)


def pair_classifier():
    from test_classifier import batch, classifier

    return classifier(), batch(label=True)


MODELS = {"pretraining": pretraining, "answering": answering, "pair_classifier": pair_classifier}


def most_seen(model: nn.Module, kept: ShardedWeights) -> list[int]:
    """The largest number of elements on this process, seen from the modules' calls on."""
    seen = [0]

    def look(*_) -> None:
        seen[0] = max(seen[0], kept.local_elements)

    for module in model.modules():
        module.register_forward_pre_hook(look)
    return seen


def sharded_beside_whole(make: str) -> dict[str, bool | int]:
    (whole, batch), (sharded, _) = MODELS[make](), MODELS[make]()
    sharded.shard_ema(own_part)
    kept = sharded.ema.sharded
    at_rest = kept.local_elements
    most = most_seen(sharded.ema.module, kept)
    same = True
    for seed in range(3):
        with torch.no_grad():
            right, ours = whole(batch), sharded(batch)
        of_ema = [name for name in right if "ema" in name or "augmented" in name]
        same &= bool(of_ema) and all(torch.equal(right[name], ours[name]) for name in of_ema)
        for model in (whole, sharded):
            moved(model, seed)
            model.ema.update(dict(model.named_parameters()))
    right, ours = whole.ema_state_dict(), sharded.ema_pieces()
    same &= right.keys() == ours.keys()
    written = {name: sum(distributed.gather_objects(len(piece.values))) for name, piece in ours.items()}
    same &= written == {name: value.numel() for name, value in right.items()}
    for name, piece in ours.items():
        of_whole = right[name].flatten()[piece.start : piece.start + len(piece.values)]
        same &= piece.shape == right[name].shape and torch.equal(piece.values, of_whole)
    sizes = [sum(shape.numel() for shape in block.shapes) for block in kept.blocks]
    return {
        "same": same,
        "kept": at_rest,
        "kept_after": kept.local_elements,
        "most": most[0] - at_rest,
        "elements": sum(sizes),
        "weights": len(list(whole.parameters())),
        "largest_two": sum(sorted(sizes)[-2:]),
    }


def each_model() -> dict[str, dict[str, bool | int]]:
    return {name: sharded_beside_whole(name) for name in MODELS}


@pytest.mark.parametrize("processes", [1, 3])
def test_sharded_weights_act_as_whole_ones(processes):
    for models in [each_model()] if processes == 1 else run_on_processes(each_model, processes):
        for name, found in models.items():
            assert found["same"], name
            # Each weight's elements divided, and rounded up.
            assert found["kept"] <= found["elements"] / processes + found["weights"], name
            assert found["kept"] == found["kept_after"], name
            # Whole at once are a block, with what calls it, and a block that it borrows from.
            assert 0 < found["most"] <= found["largest_two"] < found["elements"], name


def test_every_weight_is_in_one_block():
    for make in MODELS.values():
        model = make()[0].requires_grad_(False)
        names = [name for block in ShardedWeights(model).blocks for name in block.weights]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
