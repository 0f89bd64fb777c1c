"""Views made on the device are those of the loader: of every operation, every kind of image, and a loader's batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import encoded
from torchvision.transforms import v2

from modstruct.config import FinetuneRecipe, ViewsConfig
from modstruct.data.shards.image_rows import FinishedRows, RowsForDevice
from modstruct.data.shards.workers import OutgoingRows
from modstruct.data.transforms.decoding import decode_reduced
from modstruct.data.transforms.device_views import made_views
from modstruct.data.transforms.image_operations import OPERATIONS
from modstruct.data.transforms.image_views import ImageViews, MildRandAugment

BOTH = ("image", "image_augmented")
SEEDS = 6
CONFIGS = {
    "contrastive": ViewsConfig(),
    "fusion": ViewsConfig(plain="crop_flip", rand_augment=True, crop_scale=(0.2, 1.0)),
    "plain": ViewsConfig(auto_augment=False, flip=False),
}


def texture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise whose spectrum falls as that of photographs."""
    random_numbers = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(random_numbers.standard_normal((3, height, width))) / frequency**1.15).real
    levels = 128 + 45 * noise / max(noise.std(), 1e-9)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def flat_with_one_spot(side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), (0, 77, 255))
    image.putpixel((side // 2, 0), (255, 78, 0))
    return image


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


SPACES = [(v2.AutoAugment, 10), (MildRandAugment, 11)]
CASES = [(kind, bins, name) for kind, bins in SPACES for name in kind._AUGMENTATION_SPACE]


@pytest.mark.parametrize(("kind", "bins", "name"), CASES)
def test_an_operation_is_that_of_the_loader_at_every_magnitude(kind, bins, name):
    single = kind()
    for side in (24, 2):
        images = [texture(side, side, 1), texture(side, side, 2).quantize(4).convert("RGB"), flat_with_one_spot(side)]
        of, signed = kind._AUGMENTATION_SPACE[name]
        found = of(bins, side, side)
        magnitudes = [0.0] if found is None else [sign * float(m) for m in found for sign in (1, -1)[: 1 + signed]]
        batch = torch.from_numpy(np.stack([pixels_of(image) for image in images for _ in magnitudes]))
        made = OPERATIONS[name](batch, np.array(magnitudes * len(images)))
        for index, view in enumerate(made):
            magnitude, image = magnitudes[index % len(magnitudes)], images[index // len(magnitudes)]
            expected = single._apply_image_or_video_transform(image, name, magnitude, "nearest", single._fill)
            np.testing.assert_array_equal(view, pixels_of(expected), f"{side} pixels, by {magnitude}")


def test_every_operation_that_can_be_drawn_is_there():
    policies = v2.AutoAugment()._policies
    drawn = {name for policy in policies for name, *_ in policy} | MildRandAugment._AUGMENTATION_SPACE.keys()
    assert drawn <= OPERATIONS.keys()


def both_ways(contents: list[bytes], config: ViewsConfig, side: int, names=BOTH, scaled: bool = True) -> tuple:
    """The views of images as the loader makes them, and as the device does of what the loader sends."""
    views = ImageViews(config, side)
    rows = [kind(views, names, len(contents), OutgoingRows()) for kind in (FinishedRows, RowsForDevice)]
    for seed, content in enumerate(contents):
        seeds = seed, seed + 1000 if len(names) > 1 else None
        image, whole = decode_reduced(
            content, 10_000_000, "here", lambda size, seeds=seeds: views.reduction(size, *seeds) if scaled else 1
        )
        for of_kind in rows:
            of_kind.add(image, whole, *seeds)
    sent = rows[1].tensors()
    return rows[0].tensors(), made_views(sent, sent)


def assert_same(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert ones.keys() == others.keys()
    for name, view in ones.items():
        assert torch.equal(view, others[name].cpu()), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_views_of_any_size_are_those_of_the_loader(config):
    """All sizes in one batch: enlarged and made smaller, wide and tall, of a view's own, decoded at 1/2 to 1/8."""
    sizes = [(64, 64), (97, 65), (65, 97), (32, 32), (32, 48), (32, 33), (20, 11), (5, 90), (90, 5), (400, 300)]
    contents = [
        encoded(texture(*size), "JPEG", quality=90) for size in sizes * 3 + [(150, 700), (1, 40), (40, 1), (2, 1)]
    ]
    assert_same(*both_ways(contents, config, 32))


def test_one_view_alone_is_that_of_the_loader():
    contents = [encoded(texture(80, 60), "JPEG")] * SEEDS
    assert_same(*both_ways(contents, ViewsConfig(plain="crop_flip"), 32, names=("image",)))


def test_the_views_of_every_kind_of_image_are_those_of_the_loader():
    image, exif = texture(70, 50), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    clear = image.copy()
    clear.putalpha(image.getchannel(0))
    kinds = [encoded(image.convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA")]
    kinds += [encoded(image.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    kinds += [encoded(clear), encoded(clear, "WEBP"), encoded(image, "JPEG", exif=exif)]
    assert_same(*both_ways(kinds * 2, ViewsConfig(), 32))


def test_a_large_image_that_is_not_decoded_smaller_is_averaged():
    """Views differ as those of scaled decoding do; sent is what that would leave."""
    for content, scaled in ((encoded(texture(300, 300)), True), (encoded(texture(300, 300), "JPEG"), False)):
        ones, others = both_ways([content] * SEEDS, ViewsConfig(auto_augment=False), 32, scaled=scaled)
        for name in BOTH:
            assert 0 < (ones[name].int() - others[name].int()).abs().float().mean() < 4


def test_the_pixels_are_sent_once_where_views_overlap():
    views = ImageViews(ViewsConfig(), 32)
    rows = RowsForDevice(views, BOTH, 1, OutgoingRows())
    image, whole = decode_reduced(encoded(texture(60, 60)), 10_000, "here", lambda size: 1)
    rows.add(image, whole, 0, 1)
    assert len(rows.tensors()["image_pixels"]) == 60 * 60
    far = RowsForDevice(views, BOTH, 1, OutgoingRows())
    image, whole = decode_reduced(encoded(texture(4000, 40)), 1_000_000, "here", lambda size: 1)
    far.add(image, whole, 0, 1)  # a crop far from the centre
    assert len(far.tensors()["image_pixels"]) < 2 * 66 * 40


def test_fine_tuning_makes_its_views_in_the_loader():
    with pytest.raises(ValueError, match=r"^views\.on = 'device': fine-tuning makes its views in the loader"):
        FinetuneRecipe(views=ViewsConfig(on="device"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("products", ["ieee", "tf32"])
def test_the_views_of_a_gpu_are_those_of_the_loader(products, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", products)
    views = ImageViews(ViewsConfig(plain="crop_flip", rand_augment=True, crop_scale=(0.2, 1.0)), 224)
    rows = [kind(views, BOTH, 100, OutgoingRows()) for kind in (FinishedRows, RowsForDevice)]
    for seed in range(100):
        image, whole = decode_reduced(encoded(texture(300 + seed, 400), "JPEG"), 10_000_000, "", lambda size: 1)
        for of_kind in rows:
            of_kind.add(image, whole, seed, seed + 1000)
    sent = rows[1].tensors()
    assert_same(rows[0].tensors(), made_views({name: rows.cuda() for name, rows in sent.items()}, sent))
