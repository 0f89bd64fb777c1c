"""The grid holds each image and its captions, whatever their number and length."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageFont

from modstruct.evaluation.examples import CELL, MARGIN, RIGHT, WRONG, example_grid, wrap


def has_colour(grid, colour):
    return bool((grid == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=0).any())


def test_every_image_is_drawn_in_order():
    colours = torch.tensor([[255, 0, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(-1, -1, 16, 16)
    grid = example_grid(images, ["one"] * 5, columns=4)
    assert grid.dtype == torch.uint8
    assert grid.shape[0] == 3
    assert grid.shape[2] == MARGIN + 4 * (CELL + MARGIN)
    middle = MARGIN + CELL // 2
    for column in range(4):
        assert grid[:, middle, middle + column * (CELL + MARGIN)].tolist() == colours[column].tolist()
    assert has_colour(grid[:, MARGIN + CELL :], colours[4].tolist())


def test_a_retrieved_caption_is_green_when_right_and_red_when_wrong():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    both = example_grid(images, ["a cat", "a dog"], ["a cat", "a cat"])
    assert has_colour(both, RIGHT)
    assert has_colour(both, WRONG)
    assert not has_colour(example_grid(images, ["a cat", "a dog"], ["a cat", "a dog"]), WRONG)
    assert not has_colour(example_grid(images, ["a cat", "a dog"]), RIGHT)


@pytest.mark.parametrize("text", ["", "a b c", "word " * 500, "x" * 100_000, "日本語 Großmutter ﷽ 🦈", "a\nb\t c"])
def test_text_stays_inside_its_cell(text):
    font = ImageFont.load_default(14)
    lines = wrap(text, font, CELL, lines=4)
    assert len(lines) <= 4
    assert all(font.getlength(line) <= CELL for line in lines)
    if len(text) < 50:
        assert " ".join(lines).split() == text.split()
    example_grid(torch.zeros(1, 3, 300, 200, dtype=torch.uint8), [text])


def test_texts_and_images_must_be_as_many():
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        example_grid(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["one"])
    with pytest.raises(ValueError, match="0 images"):
        example_grid(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), [])
