"""The gradient cache: the whole batch's gradient from micro-batches, draws repeated, statistics moved once."""

from __future__ import annotations

import pytest
import torch
from plain_engine import PlainEngine
from torch import Tensor, nn
from torch.nn.functional import normalize

from modstruct.config import ContrastiveConfig, GeometryConfig, LossesConfig, SeparationConfig
from modstruct.config.losses import AlignmentConfig
from modstruct.losses.objective import build_objective
from modstruct.models.protocol import TrainableModel
from modstruct.training.gradient_cache import CachedBatch, WholeBatch, embed

PAIRS, FEATURES, WIDTH = 23, 12, 6
OBJECTIVE = build_objective(
    LossesConfig(
        contrastive=ContrastiveConfig(weight=1.0, in_modal=True),
        separation=SeparationConfig(weight=1.0),
        geometry=GeometryConfig(weight=0.25),
        alignment=AlignmentConfig(weight=1.0, uniformity_weight=1.0),
    )
)
VIEWS = ("image", "image_augmented", "text", "text_augmented")


class Towers(TrainableModel):
    """Two small towers that make what the model makes."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        for name in ("image", "text"):
            for head in ("", "_independent"):
                tower = nn.Sequential(nn.Linear(FEATURES, 16), middle, nn.Linear(16, WIDTH))
                self.add_module(name + head, tower)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch: dict[str, Tensor], embed_only: bool = False) -> dict[str, Tensor]:
        made = {"logit_scale": self.logit_scale.float().exp()}
        for view, rows in batch.items():
            modality = view.split("_")[0]
            rows = rows.to(self.logit_scale.dtype)
            made[view] = normalize(getattr(self, modality)(rows).float(), dim=1)
            own = normalize(getattr(self, f"{modality}_independent")(rows).float(), dim=1)
            made[view.replace(modality, f"{modality}_independent")] = own
        return made


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {view: torch.randn(PAIRS, FEATURES, generator=generator) for view in VIEWS}


def in_parts(rows: int) -> list[dict[str, Tensor]]:
    whole = batch()
    return [{name: z[start : start + rows] for name, z in whole.items()} for start in range(0, PAIRS, rows)]


def gradients(embedded: WholeBatch | CachedBatch) -> list[Tensor]:
    total, _ = OBJECTIVE(embedded.outputs, step=0)
    embedded.backward(total)
    return [p.grad.clone() for p in embedded.engine.model.parameters()]


def cache(engine: PlainEngine, parts: list[dict[str, Tensor]]) -> CachedBatch:
    return CachedBatch(engine, parts, OBJECTIVE, 0)


class WithGraph:
    """Every part embedded once with its graph: what the cache must give, with the memory that it must not take."""

    def __init__(self, engine: PlainEngine, parts: list[dict[str, Tensor]]):
        self.engine = engine
        made = [engine(part) for part in parts]
        rows = {n: torch.cat([m[n] for m in made]) for n in made[0] if n != "logit_scale"}
        self.outputs = rows | {"logit_scale": made[0]["logit_scale"]}

    def backward(self, total: Tensor) -> None:
        total.backward()


def assert_equal_gradients(found: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for f, r in zip(found, right, strict=True):
        assert (f.double() - r.double()).norm() <= tolerance * r.double().norm()


@pytest.mark.parametrize("rows", [1, 5, 22])
def test_gradients_are_those_of_the_undivided_batch(rows):
    cached = PlainEngine(Towers(nn.GELU()))
    found = gradients(cache(cached, in_parts(rows)))
    assert_equal_gradients(found, gradients(WholeBatch(PlainEngine(Towers(nn.GELU())), batch())), 1e-5)
    assert cached.reductions == 1


def test_dropout_falls_as_it_did_in_the_first_pass():
    torch.manual_seed(7)
    found = gradients(cache(PlainEngine(Towers(nn.Dropout(0.4))), in_parts(5)))
    after = torch.rand(3)
    torch.manual_seed(7)
    right = gradients(WithGraph(PlainEngine(Towers(nn.Dropout(0.4))), in_parts(5)))
    assert_equal_gradients(found, right, 1e-5)
    assert torch.equal(after, torch.rand(3))  # and the next step draws what it would have drawn


def test_batch_norm_statistics_move_once_a_step():
    cached, graph = (PlainEngine(Towers(nn.BatchNorm1d(16))) for _ in range(2))
    found, right = gradients(cache(cached, in_parts(8))), gradients(WithGraph(graph, in_parts(8)))
    assert_equal_gradients(found, right, 1e-5)
    for moved, once in zip(cached.model.buffers(), graph.model.buffers(), strict=True):
        torch.testing.assert_close(moved, once)


def test_bfloat16_gradients_are_summed_in_float32():
    """Of 23 micro-batches: no worse than rounding once, where a sum in bfloat16 rounds at every one."""
    low = PlainEngine(Towers(nn.GELU()).bfloat16())
    summed = gradients(cache(low, in_parts(1)))
    # The same micro-batch gradients, kept apart and added in float64.
    single = PlainEngine(Towers(nn.GELU()).bfloat16())
    cached = cache(single, in_parts(1))
    OBJECTIVE(cached.outputs, step=0)[0].backward()
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in single.model.parameters()]
    rounded = [torch.zeros_like(p) for p in single.model.parameters()]
    for i, part in enumerate(in_parts(1)):
        made = single(part)
        names = [n for n in made if n != "logit_scale"]
        carrier = sum((made[n] * cached.leaves[n].grad[i]).sum() for n in names)
        if i == 0:
            carrier = carrier + (made["logit_scale"] * cached.leaves["logit_scale"].grad).sum()
        got = torch.autograd.grad(carrier, list(single.model.parameters()), allow_unused=True)
        for total, low_total, g in zip(exact, rounded, got, strict=True):
            if g is not None:
                total += g.double()
                low_total += g

    def error(sums: list[Tensor]) -> float:
        off = sum((s.double() - e).square().sum() for s, e in zip(sums, exact, strict=True))
        return (off / sum(e.square().sum() for e in exact)).sqrt().item()

    assert error(summed) < 2**-8  # half a unit in the last place of bfloat16, whose significand has 8 bits
    assert error(summed) < error(rounded) / 2


def test_one_part_is_embedded_with_its_graph():
    assert isinstance(embed(PlainEngine(Towers(nn.GELU())), [batch()], OBJECTIVE, 0), WholeBatch)
    assert isinstance(embed(PlainEngine(Towers(nn.GELU())), in_parts(12), OBJECTIVE, 0), CachedBatch)
