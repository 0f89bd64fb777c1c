"""EMA weights are exponential averages; the queue holds the last pairs, whatever the batches' sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_fusion import fusion_model, fusion_recipe, training_batch

from modstruct.models.fusion.ema import FeatureQueue


def updated(model, batch):
    with torch.no_grad():
        # Cloned: the queue in the outputs is a view of what the next push writes into.
        outputs = {name: value.clone() for name, value in model(batch).items()}
    model.update_ema(outputs, batch, 0)
    return outputs


@pytest.mark.parametrize("share", [0.0, 0.5, 0.995])
def test_ema_weights_are_the_exponential_average(share):
    model = fusion_model(fusion_recipe(independent=True, momentum=share))
    generator = torch.Generator().manual_seed(1)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for _ in range(7):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        updated(model, training_batch())
        for name, p in model.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * p.detach().double()
    found = dict(model.ema.module.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_ema_weights_and_queue_are_no_part_of_the_module():
    model = fusion_model()
    for names in (model.state_dict(), dict(model.named_parameters()), dict(model.named_buffers())):
        assert not [name for name in names if "momentum" in name or "queue" in name or "outside" in name]
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in model.ema.module.parameters()}
    assert not any(p.requires_grad for p in model.ema.module.parameters())
    assert not model.ema.module.training
    assert not model.train().ema.module.training


def test_the_ema_state_is_restored():
    model, other = fusion_model(seed=0), fusion_model(seed=1)
    updated(model, training_batch())
    state = {name: value.clone() for name, value in model.ema_state_dict().items()}
    other.load_ema_state_dict(state)
    assert state.keys() == other.ema_state_dict().keys()
    assert all(torch.equal(value, other.ema_state_dict()[name]) for name, value in state.items())
    assert other.queue.filled == 6
    updated(model, training_batch(seed=1))  # the loaded state is a copy of its own
    assert all(torch.equal(value, other.ema_state_dict()[name]) for name, value in state.items())


@given(size=st.integers(0, 12), batches=st.lists(st.integers(1, 30), max_size=8))
def test_the_queue_holds_the_last_pairs(size, batches):
    queue = FeatureQueue(size, 2)
    came = torch.empty(0, dtype=torch.int64)
    for count in batches:
        new = torch.arange(len(came), len(came) + count)
        queue.push(torch.stack([new, new + 0.5], 1), torch.stack([-new.float(), new], 1), new)
        came = torch.cat([came, new])
        right = came[len(came) - min(size, len(came)) :]
        assert queue.filled == len(right)
        ids = queue.ids[: queue.filled]
        assert sorted(ids.tolist()) == right.tolist()
        assert torch.equal(queue.image[: queue.filled], torch.stack([ids, ids + 0.5], 1))  # rows stay together
        assert torch.equal(queue.text[: queue.filled], torch.stack([-ids.float(), ids.float()], 1))


@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), min_size=1, max_size=6), cut=st.integers(0, 5))
def test_a_restored_queue_continues(size, batches, cut):
    whole, begun, resumed = (FeatureQueue(size, 1) for _ in range(3))

    def push(queue, numbers):
        for number in numbers:
            rows = torch.arange(number * 100, number * 100 + batches[number])
            queue.push(rows[:, None], rows[:, None], rows)

    cut = min(cut, len(batches))
    push(whole, range(len(batches)))
    push(begun, range(cut))
    resumed.load(begun.state())
    push(resumed, range(cut, len(batches)))
    assert all(torch.equal(value, resumed.state()[name]) for name, value in whole.state().items())


def test_the_queue_takes_ema_embeddings_of_the_batch():
    model = fusion_model(fusion_recipe(queue=8))
    batch = training_batch(rows=6)
    first = updated(model, batch)
    assert first["image_queue"].shape == (0, 8)
    second = updated(model, training_batch(rows=6, seed=1))
    assert torch.equal(second["image_queue"][:6], first["image_augmented"])
    assert second["queue_ids"].tolist() == batch["image_id"].tolist()
    assert model.queue.filled == 8
    # Of twelve that came into eight places the last eight are there: 4 of the first batch's are overwritten.
    assert torch.equal(model.queue.image[[6, 7, 0, 1, 2, 3]], second["image_augmented"])
    assert torch.equal(model.queue.text[[4, 5]], first["text_augmented"][[4, 5]])


def test_a_queue_of_none():
    model = fusion_model(fusion_recipe(queue=0))
    updated(model, training_batch())
    assert updated(model, training_batch())["text_queue"].shape == (0, 8)


def test_in_bfloat16_the_ema_model_stays_float32_and_moves():
    model = fusion_model(fusion_recipe(momentum=0.995)).to(torch.bfloat16)
    before = model.ema.module.image_head.weight.clone()
    with torch.no_grad():
        model.image_head.weight.add_(0.5)
    for _ in range(3):
        outputs = updated(model, training_batch())
        floating = [value for value in outputs.values() if value.is_floating_point()]
        assert all(value.isfinite().all() for value in floating)
    assert {p.dtype for p in model.ema.module.parameters()} == {torch.float32}
    assert model.queue.image.dtype == torch.float32
    moved = (model.ema.module.image_head.weight - before).mean()
    assert moved == pytest.approx(0.5 * (1 - 0.995**3), rel=0.02)
