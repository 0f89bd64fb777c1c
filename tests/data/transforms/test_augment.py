"""Views: seeded, of one shape for any image, and without a trace in the generators that the training draws from."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from modstruct.config import ViewsConfig
from modstruct.data.transforms.augment import Views, sample_seed
from modstruct.data.transforms.image_views import random_crop_box
from modstruct.data.transforms.text_views import EasyDataAugmentation, wordnet_synonyms

SIZE = 32
CAPTION = "a small red circle above two large blue squares on a striped ground tonight"
CONFIGS = [
    ViewsConfig(),
    ViewsConfig(auto_augment=False),
    ViewsConfig(plain="crop_flip", auto_augment=False, flip=False, crop_scale=(0.1, 1.0)),
]


def drawn_image(width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A smooth image without symmetries."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [np.sin(0.09 * rows + 0.02 * columns), np.cos(0.05 * columns), np.sin(0.003 * rows * columns)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(channels, axis=-1))).convert(mode)


def all_views(views: Views, image: Image.Image, seed: int) -> list[torch.Tensor]:
    return [views.plain_image(image, seed), views.augmented_image(image, seed), views.evaluation_image(image)]


# Seeds


def test_seeds_are_stable_and_in_range():
    assert sample_seed(0, 0, 0, "image") == sample_seed(0, 0, 0, "image")
    for arguments in [(0, 0, 0, 0), (2**63, -1, 2**40, "x"), (-5, 10**9, 7, "")]:
        assert 0 <= sample_seed(*arguments) < 2**63


words = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(words, words, words, words, st.integers(0, 3), words)
def test_seeds_that_differ_in_one_argument_never_collide(seed, epoch, sample, salt, which, other):
    arguments = [seed, epoch, sample, salt]
    changed = list(arguments)
    changed[which] = other
    assert (sample_seed(*arguments) == sample_seed(*changed)) == (arguments == changed)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**63 - 1])
def test_arrays_give_the_seeds_of_their_pairs(seed):
    epochs, samples = np.array([0, 1, 5, 2**31]), np.array([3, 2**40, 0, 2**62])
    expected = [sample_seed(seed, *pair, "image") for pair in zip(epochs.tolist(), samples.tolist(), strict=True)]
    assert sample_seed(seed, epochs, samples, "image").tolist() == expected


def test_views_are_written_where_they_are_wanted():
    views, image = Views(ViewsConfig(), SIZE), drawn_image(40, 30)
    for make in (views.plain_image, views.augmented_image):
        rows = np.zeros((2, 3, SIZE, SIZE), dtype=np.uint8)
        made = make(image, 5, rows[1])
        assert torch.equal(made, make(image, 5))
        assert np.array_equal(rows[1], made.numpy())
        assert not rows[0].any()


def test_neighbouring_seeds_do_not_collide_or_resemble():
    seeds = [sample_seed(s, e, n, salt) for s in range(4) for e in range(4) for n in range(250) for salt in ("a", "b")]
    assert len(set(seeds)) == len(seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.05
    assert abs((bits[1:] != bits[:-1]).sum(axis=1).mean() - 31.5) < 1


# Images


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "size", [(1, 1000), (1000, 1), (1, 1), (3, 700), (SIZE, SIZE), (SIZE + 1, SIZE), (2, 3), (500, 400), (1, 100_000)]
)
def test_any_size_gives_one_shape(config, size):
    for view in all_views(Views(config, SIZE), drawn_image(*size), seed=3):
        assert view.shape == (3, SIZE, SIZE)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_any_mode_gives_three_channels(mode):
    for view in all_views(Views(ViewsConfig(), SIZE), drawn_image(mode=mode), seed=3):
        assert view.shape == (3, SIZE, SIZE)


def test_an_image_of_the_right_size_comes_back_as_it_is():
    image = drawn_image(SIZE, SIZE)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(Views(ViewsConfig(), SIZE).evaluation_image(image), expected)


@pytest.mark.parametrize("size", [(64, 64), (100, 75), (75, 100), (61, 66), (20, 31), (300, 47)])
def test_centre_crop_agrees_with_torchvision(size):
    image = drawn_image(*size)
    resize = v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC)
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(SIZE)(resize(image)))
    difference = (Views(ViewsConfig(), SIZE).evaluation_image(image).int() - expected.int()).abs()
    assert difference.max() <= 3  # of 255: torchvision rounds the whole resized image, not the crop alone


def test_evaluation_is_the_centre_whatever_the_plain_view():
    image = drawn_image()
    centre, cropped = Views(ViewsConfig(), SIZE), Views(ViewsConfig(plain="crop_flip"), SIZE)
    assert torch.equal(centre.evaluation_image(image), cropped.evaluation_image(image))
    assert torch.equal(centre.evaluation_image(image), centre.plain_image(image, 1))
    assert not torch.equal(cropped.plain_image(image, 1), cropped.evaluation_image(image))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_seed_decides_the_view(config):
    views, image = Views(config, SIZE), drawn_image()
    copy = pickle.loads(pickle.dumps(views))
    seen = set()
    for seed in range(60):
        first, again = all_views(views, image, seed), all_views(copy, image, seed)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        seen.add(first[1].numpy().tobytes())
    assert len(seen) >= 55


def test_auto_augment_and_flip_follow_the_recipe():
    image = drawn_image(SIZE, SIZE)
    whole = {"crop_scale": (1.0, 1.0), "plain": "crop_flip"}
    off = Views(ViewsConfig(auto_augment=False, flip=False, **whole), SIZE)
    flip = Views(ViewsConfig(auto_augment=False, flip=True, **whole), SIZE)
    on = Views(ViewsConfig(auto_augment=True, flip=False, **whole), SIZE)
    flipped = changed = 0
    for seed in range(200):
        crop = off.augmented_image(image, seed)
        assert torch.equal(off.plain_image(image, seed), crop)
        mirror = flip.augmented_image(image, seed)
        assert torch.equal(mirror, crop) or torch.equal(mirror, crop.flip(2))
        flipped += not torch.equal(mirror, crop)
        changed += not torch.equal(on.augmented_image(image, seed), crop)
    assert 70 <= flipped <= 130  # a fair coin: 100 give or take four standard deviations
    assert changed > 120


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), words, st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_random_crops_lie_inside_and_keep_their_share(width, height, seed, scale):
    low, high = sorted(scale)
    left, top, crop_width, crop_height = random_crop_box(width, height, (low, high), random.Random(seed))
    assert 0 <= left <= left + crop_width <= width
    assert 0 <= top <= top + crop_height <= height
    assert crop_width >= 1
    assert crop_height >= 1
    if crop_width < width and crop_height < height:  # else the shape may not have allowed the share
        # Rounding moves each side by half a pixel.
        assert (crop_width - 0.5) * (crop_height - 0.5) <= high * width * height
        assert low * width * height <= (crop_width + 0.5) * (crop_height + 0.5)


def test_random_crops_cover_the_shares_asked_for():
    generator = random.Random(0)
    boxes = [random_crop_box(200, 200, (0.3, 0.6), generator) for _ in range(500)]
    shares = np.array([width * height for _, _, width, height in boxes]) / 200**2
    assert 0.29 < shares.min() < 0.33
    assert 0.57 < shares.max() < 0.61
    assert abs(shares.mean() - 0.45) < 0.02


def test_no_global_generator_is_touched():
    views, image = Views(ViewsConfig(plain="crop_flip"), SIZE), drawn_image()
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002, the global generator is what the test is about
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    for seed in range(30):
        all_views(views, image, seed)
        views.augmented_text(CAPTION, seed)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))  # noqa: NPY002


def test_the_global_generator_is_put_back_after_an_error(monkeypatch):
    def fails(*_):
        torch.rand(3)
        raise RuntimeError("broken")

    monkeypatch.setattr(v2.AutoAugment, "forward", fails)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        Views(ViewsConfig(), SIZE).augmented_image(drawn_image(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_global_generators_do_not_change_the_views():
    views, image = Views(ViewsConfig(plain="crop_flip"), SIZE), drawn_image()
    first = all_views(views, image, 5)
    torch.rand(1)
    random.random()
    assert all(torch.equal(one, other) for one, other in zip(first, all_views(views, image, 5), strict=True))


def fingerprint() -> str:
    """Hash of many views, to be compared between processes."""
    digest = hashlib.sha256()
    views, image = Views(ViewsConfig(plain="crop_flip"), SIZE), drawn_image()
    for sample in range(40):
        seed = sample_seed(7, 1, sample, "view")
        for view in all_views(views, image, seed):
            digest.update(view.numpy().tobytes())
        digest.update(views.augmented_text(CAPTION, seed).encode())
    return digest.hexdigest()


def test_another_process_makes_the_same_views():
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom test_augment import fingerprint\nprint(fingerprint())"
    command = [sys.executable, "-c", code, os.path.dirname(__file__), *[path for path in sys.path if path]]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.split()[-1] == fingerprint()


# Captions

captions = st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=6), max_size=12).map(
    " ".join
)


@settings(deadline=None)
@given(captions, words, st.floats(0.01, 1))
def test_each_operation_changes_what_it_may(caption, seed, rate):
    before = caption.split()
    augment = EasyDataAugmentation(rate)
    changed = augment(caption, seed)
    after = changed.split()
    assert changed == augment(caption, seed)
    if not before:
        assert changed == caption
        return
    assert after
    assert set(after) <= set(before)
    assert after != before, "some operation can change any caption that has a word"
    if len(after) < len(before):
        assert is_subsequence(after, before)
    elif len(after) > len(before):
        assert is_subsequence(before, after)
        assert len(after) - len(before) == max(1, int(rate * len(before)))
    else:
        assert Counter(after) == Counter(before)


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def test_all_operations_occur_about_equally_often():
    lengths = Counter(
        np.sign(len(EasyDataAugmentation(0.1)(CAPTION, seed).split()) - len(CAPTION.split())) for seed in range(600)
    )
    assert all(140 < lengths[sign] < 260 for sign in (-1, 0, 1))


def test_rate_is_the_share_of_words_that_change():
    caption = " ".join(str(number) for number in range(100))
    lengths = [len(EasyDataAugmentation(0.2)(caption, seed).split()) for seed in range(300)]
    assert max(lengths) == 120
    deleted = [100 - length for length in lengths if length < 100]
    assert abs(np.mean(deleted) - 20) < 2


def test_rate_zero_and_empty_texts_come_back_as_they_are():
    assert EasyDataAugmentation(0.0)(CAPTION, 1) == CAPTION
    for text in ("", "  \n "):
        assert EasyDataAugmentation(0.5)(text, 1) == text


@pytest.mark.parametrize(("text", "field"), [("eda", None), ("reworded", "reworded"), ("field:a b:c", "a b:c")])
def test_augmented_captions_are_made_or_read_as_the_recipe_says(text, field):
    assert Views(ViewsConfig(text=text), SIZE).text_field == field


@pytest.mark.parametrize("text", ["", "EDA", "field", "field:", "other", "field: "])
def test_an_unknown_source_of_augmented_captions_is_refused(text):
    with pytest.raises(ValueError, match=r"views\.text = .*: eda, reworded, or field:NAME"):
        ViewsConfig(text=text)


def test_plain_text_is_the_caption():
    assert Views(ViewsConfig(), SIZE).plain_text(CAPTION) == CAPTION


# WordNet, which the test machine need not have: a stand-in with two synsets.

SYNSETS = {"small": [["small", "little", "tiny"]], "ground": [["ground", "solid_ground"], ["earth"]], "a": [["ampere"]]}


class StandInWordNet:
    def __init__(self, installed: bool = True):
        self.installed = installed

    def ensure_loaded(self) -> None:
        if not self.installed:
            raise LookupError("Resource wordnet not found.")

    def synsets(self, word: str) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(lemma_names=lambda names=names: names) for names in SYNSETS.get(word, [])]


def install(monkeypatch, wordnet: StandInWordNet | None) -> None:
    nltk = corpus = None  # what makes `import nltk` fail
    if wordnet is not None:
        nltk, corpus = types.ModuleType("nltk"), types.ModuleType("nltk.corpus")
        nltk.corpus, corpus.wordnet = corpus, wordnet
        nltk.data = types.SimpleNamespace(path=["/somewhere/nltk_data"])
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


def test_missing_nltk_is_refused_by_name(monkeypatch):
    install(monkeypatch, None)
    with pytest.raises(ValueError, match=r"^views\.eda_synonyms.*pip install"):
        Views(ViewsConfig(eda_synonyms=True), SIZE)
    Views(ViewsConfig(), SIZE)


def test_missing_wordnet_is_refused_by_name(monkeypatch):
    install(monkeypatch, StandInWordNet(installed=False))
    with pytest.raises(ValueError, match=r"^views\.eda_synonyms.*nltk\.downloader wordnet"):
        Views(ViewsConfig(eda_synonyms=True), SIZE)


def test_synonyms_are_sorted_keep_punctuation_and_leave_function_words_alone(monkeypatch):
    install(monkeypatch, StandInWordNet())
    assert wordnet_synonyms("small") == ["little", "tiny"]
    assert wordnet_synonyms("(Ground,") == ["(earth,", "(solid ground,"]
    assert wordnet_synonyms("A") == wordnet_synonyms("unknown") == wordnet_synonyms("...") == []


def test_replacement_and_insertion_use_synonyms(monkeypatch):
    install(monkeypatch, StandInWordNet())
    augment = EasyDataAugmentation(0.1, synonyms=True)
    synonyms = {"little", "tiny", "earth", "solid ground"}
    caption = "a small red circle on small ground"
    kinds = Counter()
    for seed in range(300):
        changed = augment(caption, seed)
        assert changed != caption
        words = changed.replace("solid ground", "solid_ground").split()
        if any(synonym in changed for synonym in synonyms):
            replaced = len(words) == 7
            kinds["replaced" if replaced else "inserted"] += 1
            if replaced and "small" not in words:
                assert words[1] == words[5], "every occurrence gives way to the same synonym"
        else:
            kinds["swapped" if len(words) == 7 else "deleted"] += 1
            assert len(words) <= 7
    assert all(40 < kinds[kind] < 120 for kind in ("replaced", "inserted", "swapped", "deleted"))


def test_words_without_synonyms_are_swapped_or_deleted_instead(monkeypatch):
    install(monkeypatch, StandInWordNet())
    augment = EasyDataAugmentation(0.1, synonyms=True)
    for seed in range(50):
        assert augment("red circle", seed) in {"red", "circle", "circle red"}
        assert augment("circle", seed) == "circle"
