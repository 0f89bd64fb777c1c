"""The grid holds each image and its captions, whatever their number and length."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modstruct.evaluation.examples import SPRITE, example_grid, projected_points


def pixels_of(grid, colour):
    """Rows and columns of the pixels of a colour (r, g, b); text is drawn in shades of its own."""
    return (grid.int() - torch.tensor(colour)[:, None, None]).abs().sum(dim=0).lt(60).nonzero()


def test_every_image_is_drawn_in_order():
    colours = torch.tensor([[255, 0, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(-1, -1, 16, 16)
    grid = example_grid(images, ["one"] * 5, ["two"] * 5, columns=4)
    assert (grid.dtype, grid.shape[0]) == (torch.uint8, 3)
    centres = [pixels_of(grid, colour.tolist()).double().mean(0) for colour in colours]
    rows, columns = (torch.stack(centres)[:, axis] for axis in (0, 1))
    assert (columns[:4].diff() > 200).all()
    assert rows[:4].max() - rows[:4].min() < 1
    assert rows[4] > rows[0] + 200
    assert abs(columns[4] - columns[0]) < 1


def is_drawn_in(grid, channel):
    """Whether a pixel is redder (0) or greener (1) than anything grey."""
    others = [other for other in range(3) if other != channel]
    return bool((grid[channel].int() - grid[others].int().amax(0) > 25).any())


def test_a_retrieved_caption_is_green_when_right_and_red_when_wrong():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for found, red, green in ((["a cat"] * 2, True, True), (["a cat", "a dog"], False, True)):
        grid = example_grid(images, ["a cat", "a dog"], found)
        assert (is_drawn_in(grid, 0), is_drawn_in(grid, 1)) == (red, green)


@pytest.mark.parametrize("text", ["", "a b c", "word " * 500, "x" * 100_000, "日本語 ﷽ 🦈", "a\nb\t c", "$x_$ ^{"])
def test_any_text_stays_in_its_cell(text, recwarn):
    images = torch.full((4, 3, 300, 200), 255, dtype=torch.uint8)
    grid = example_grid(images, ["", text, "", ""], ["", text, "", ""], columns=2)
    without = example_grid(images, [""] * 4, [""] * 4, columns=2)
    rows, columns = (grid != without).any(dim=0).nonzero().T
    assert (columns >= grid.shape[2] // 2).all()
    assert (rows <= grid.shape[1] // 2).all()
    assert not recwarn.list


def test_the_projectors_points_are_images_and_a_caption_of_each():
    """Images 0 to 3 in rows; image 2 has two captions."""
    image, text = np.eye(4, 8, dtype=np.float16), -np.eye(5, 8, dtype=np.float16)
    source = SimpleNamespace(
        distinct_rows=lambda array: image,
        rows=lambda array: text,
        distinct_pairs=np.array([[0, 0], [1, 1], [2, 2], [2, 3], [3, 4]]),
        captions=list("abcde"),
        indices=np.arange(4),
    )
    samples = [SimpleNamespace(image=number) for number in range(4)]
    views = SimpleNamespace(evaluation_image=lambda number: torch.full((3, 48, 48), 60 * number, dtype=torch.uint8))
    points = projected_points(source, samples, views, 4)
    assert torch.equal(points.rows, torch.from_numpy(np.concatenate([image, text[[0, 1, 2, 4]]]).astype(np.float32)))
    assert points.labels == [(kind, caption) for kind in ("image", "text") for caption in "abce"]
    assert points.images.shape == (8, 3, SPRITE, SPRITE)
    assert torch.allclose(points.images[:4, 0, 0, 0], torch.arange(4) * 60 / 255, atol=1e-5)
    assert (points.images[4:] == 1).all()
