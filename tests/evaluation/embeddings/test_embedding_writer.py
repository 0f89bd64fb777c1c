"""Sets embedded in parts: as the in-training evaluation sees them, and the same after any stop."""

from __future__ import annotations

import numpy as np
import pytest
from numbered_images import CLASS_FILE, LookUp, write_source
from numbered_sets import ARRAYS, Encode, LabelledNumbers, config, content, numbered_model, rows_of

from modstruct.data.classification.class_files import load_classes
from modstruct.data.classification.labelled_shards import LabelledSamples
from modstruct.data.faults import TooManyBadSamples
from modstruct.evaluation.embeddings.embed import embed, embed_sets
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.source import EmbeddingSource

NUMBERS = [i % 37 for i in range(43)]
BROKEN = (8, 9, 10, 11)  # the third batch of four is bad as a whole


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_source(folder, NUMBERS, lambda n: [f"thing {n}", f"object {n % 20}"], broken=BROKEN)


@pytest.fixture(scope="module")
def source(samples):
    folder = samples.samples.shards[0].rsplit("/", 1)[0]
    with open(f"{folder}/classes.yaml", "w") as file:
        file.write(CLASS_FILE)
    return EmbeddingSource.of_samples("things", samples, load_classes(f"{folder}/classes.yaml"))


def test_a_set_holds_what_the_evaluation_in_training_embeds(tmp_path, samples, source):
    embedded = embed(numbered_model(), source, config(dtype="float32"), tmp_path)
    expected = embed(numbered_model(), source, config(dtype="float32"))
    assert expected.folder is None
    for array in ARRAYS:
        np.testing.assert_array_equal(embedded.rows(array), expected.rows(array))
    for table in ("pairs", "distinct_pairs", "indices", "copies", "labels", "class_prompts"):
        np.testing.assert_array_equal(getattr(embedded, table), getattr(expected, table))
    assert (embedded.captions, embedded.keys) == (expected.captions, expected.keys)
    kept = [place for place in range(43) if place not in BROKEN]
    assert embedded.keys == [f"{place:05d}" for place in sorted(kept, key=lambda place: place >= 37)]  # copies last
    by_number = sorted(zip(embedded.indices, embedded.metadata, strict=True), key=lambda of_image: of_image[0])
    assert [fields["parity"] for _, fields in by_number] == ["odd" if NUMBERS[n] % 2 else "even" for n in kept]
    assert embedded.arrays == set(ARRAYS)
    np.testing.assert_array_equal(embedded.rows("image_features"), 30 * embedded.rows("image")[:, :5])
    assert embedded.manifest["skipped"] == expected.manifest["skipped"] == {"undecodable image": 4}
    assert (tmp_path / "left_out.jsonl").read_text().count("00008.png") == 1
    assert embedded.manifest["source"]["fingerprint"] == samples.samples.fingerprint


def test_labels_and_class_prompts_are_embedded_with_the_images(tmp_path, source):
    embedded = embed(numbered_model(), source, config(), tmp_path)
    assert embedded.labels.tolist() == [n % 2 for place, n in enumerate(NUMBERS) if place not in BROKEN]
    assert (embedded.class_names, embedded.templates) == (["even", "odd"], ["an {} number", "one {}"])
    words = [
        len(word) + 197 for word in ("number", "even", "number", "odd")
    ]  # the tokenizer knows a word by its length
    expected = rows_of(words, LookUp(noise=0.5).text_table).reshape(2, 2, 8)
    np.testing.assert_array_equal(embedded.class_prompts, expected)
    assert embedded.class_prompts.dtype == np.float32


def test_labelled_images_have_no_texts(tmp_path):
    images = LabelledNumbers(30, broken=(4,))
    (embedded,) = embed_sets(numbered_model(), [(EmbeddingSource.of_labelled(images), config())], tmp_path)
    kept = [i for i in range(30) if i != 4]
    assert embedded.folder == tmp_path / "numbers"
    assert embedded.labels.tolist() == [i % 3 for i in kept]
    assert embedded.keys == [f"key {i}" for i in kept]
    np.testing.assert_array_equal(embedded.rows("image"), rows_of(kept, LookUp().image_table).astype(np.float16))
    np.testing.assert_array_equal(
        embedded.class_prompts, rows_of([7, 7, 8, 8, 9, 9], LookUp(noise=0.5).text_table).reshape(3, 2, 8)
    )
    assert embedded.arrays == {"image", "image_features", "image_augmented"}
    assert embedded.captions == []
    assert embedded.manifest["skipped"] == {"no label": 2, "undecodable image": 1}
    assert len(embedded.pairs) == 0


def test_class_prompts_are_embedded_once_for_all_sets_of_an_evaluation(tmp_path):
    first, second = LabelledNumbers(9), LabelledNumbers(12)
    second.name = "others"
    encode, sources = Encode(), [EmbeddingSource.of_labelled(images) for images in (first, second)]
    sets = embed_sets(numbered_model(encode), [(source, config()) for source in sources], tmp_path)
    assert sum("text" in call for call in encode.calls) == 2  # batches of the six prompts
    np.testing.assert_array_equal(sets[0].class_prompts, sets[1].class_prompts)
    again = Encode()
    embed(numbered_model(again), sources[0], config(batch=5), tmp_path / "of another batch")
    assert sum("text" in call for call in again.calls) == 2, "a batch's other rows may move the last bit"


def test_other_classes_of_the_same_samples_take_no_pass_over_them(tmp_path):
    """The files are those of an embedding from the images, whether the set beside has classes or not."""
    samples = write_source(tmp_path / "shards", NUMBERS, lambda n: [f"thing {n}"], label_of=labels_of)
    (tmp_path / "third.yaml").write_text('label: third\ntemplates: ["a {}"]\nclasses: {0: none, 1: one, 2: two}\n')
    (tmp_path / "parity.yaml").write_text(CLASS_FILE)
    sets = {"plain": EmbeddingSource.of_samples("plain", samples)}
    for name in ("third", "parity"):
        classes, shard = load_classes(tmp_path / f"{name}.yaml"), samples.samples.shards[0]
        sets[name] = EmbeddingSource.of_labelled(LabelledSamples(name, shard, classes, samples.config))
    fresh = {name: embed(numbered_model(), of, config(), tmp_path / f"of-{name}" / name) for name, of in sets.items()}
    encode = Encode()
    for name, of in sets.items():
        before = len(encode.calls)
        made = embed(numbered_model(encode), of, config(), tmp_path / "beside" / name)
        assert content(made.folder) == content(fresh[name].folder)
        images = sum("image" in call for call in encode.calls[before:])
        assert images == (22 if name == "plain" else 0)  # eleven batches, twice
    assert made.metadata[3]["label"] == 1
    before = len(encode.calls)
    embed(numbered_model(encode), sets["third"], config(arrays=["image"]), tmp_path / "beside" / "others")
    assert sum("image" in call for call in encode.calls[before:]) == 11  # other arrays are another embedding


def labels_of(number):
    return {"parity": "odd" if number % 2 else "even", "third": number % 3}


def test_images_of_unknown_bytes_are_counted_and_named(tmp_path, source, caplog, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("modstruct.data.shards.evaluation_samples.digest_of", lambda content: b"")
        with pytest.raises(ArithmeticError):
            embed(numbered_model(Encode(stop_after=9)), source, config(), tmp_path)
    resumed = embed(numbered_model(), source, config(), tmp_path)
    of = r"set things: 12 of 39 images were embedded by an earlier version, and equal images are not merged; --emb"
    assert of in caplog.text
    assert (len(resumed.copies), len(resumed.distinct_rows("image"))) == (0, 39)


@pytest.mark.parametrize("batches", [0, 3, 8, 20, 27, 40])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, source, batches):
    """Stopped among the images, the captions and the class prompts, or never."""
    choice = config()
    embed(numbered_model(), source, choice, tmp_path / "whole")
    stopped = Encode(stop_after=batches)
    if batches < 35:
        with pytest.raises(ArithmeticError, match="stopped in the middle"):
            embed(numbered_model(stopped), source, choice, tmp_path / "stopped")
        with pytest.raises(FileNotFoundError, match="unfinished"):
            EmbeddedSet.open(tmp_path / "stopped")
    rest = Encode()
    embed(numbered_model(rest), source, choice, tmp_path / "stopped")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    whole = Encode()
    embed(numbered_model(whole), source, choice, tmp_path / "again")
    if batches < 35:  # at most what one part and its augmented images take is done twice
        assert len(whole.calls) <= batches + len(rest.calls) <= len(whole.calls) + 4


def test_a_set_that_is_there_is_left_as_it_is(tmp_path, source):
    choice = config()
    embed(numbered_model(), source, choice, tmp_path)
    (tmp_path / "parts").mkdir()  # as a run that was killed at its very end leaves them
    encode = Encode()
    assert embed(numbered_model(encode), source, choice, tmp_path).name == "things"
    assert encode.calls == []
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dtype": "float32"},
            "embedding.dtype = 'float32': .* was embedded with 'float16'; give that, another folder",
        ),
        ({"batch": 5}, "embedding.batch = 5"),
        ({"arrays": ["image"]}, r"embedding.arrays = \['image'\]"),
        ({"seed": 1}, "embedding.seed = 1"),
    ],
)
@pytest.mark.parametrize("stop_after", [3, None])
def test_a_restart_with_another_setting_is_refused_by_its_name(tmp_path, source, changes, message, stop_after):
    try:
        embed(numbered_model(Encode(stop_after)), source, config(), tmp_path)
    except ArithmeticError:
        assert stop_after
    with pytest.raises(ValueError, match=message):
        embed(numbered_model(), source, config(**changes), tmp_path)
    again = embed(numbered_model(), source, config(overwrite=True, **changes), tmp_path)
    assert again.manifest["settings"].items() >= {f"embedding.{name}": value for name, value in changes.items()}.items()


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda of: cut(of / "keys.jsonl"), r"keys\.jsonl': is damaged .* embed the set again"),
        (lambda of: cut(of / "metadata.jsonl"), r"metadata\.jsonl': is damaged"),
        (lambda of: cut(of / "image.npy"), r"image\.npy': is damaged"),
        (lambda of: (of / "classes.json").write_text("{}"), r"classes\.json': is damaged"),
        (
            lambda of: np.save(of / "labels.npy", np.full(9, 3)),
            r"labels\.npy': is damaged \(.* from -1 to below 3",
        ),
        (lambda of: cut(of / "manifest.json"), r"manifest\.json': is damaged"),
    ],
)
def test_a_damaged_set_is_found_before_another_is_embedded(tmp_path, source, damage, message):
    numbers = EmbeddingSource.of_labelled(LabelledNumbers(9))
    (made,) = embed_sets(numbered_model(), [(numbers, config())], tmp_path)
    encode = Encode()
    damage(made.folder)
    with pytest.raises(ValueError, match=message):
        embed_sets(numbered_model(encode), [(source, config()), (numbers, config())], tmp_path)
    assert encode.calls == []


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_rows_that_are_not_finite_end_the_embedding_at_once(tmp_path, source, value):
    encode = Encode()

    def overflowing(batch):
        return {name: value * rows if "features" in name else rows for name, rows in encode(batch).items()}

    with pytest.raises(ValueError, match=r"embedding\.arrays = 'image_features': .* not finite: .* float32"):
        embed_sets(numbered_model(overflowing), [(source, config())], tmp_path)
    assert len(encode.calls) == 2, "of a batch and its augmented views"


def test_an_interrupted_set_whose_settings_are_damaged_says_so(tmp_path, source):
    with pytest.raises(ArithmeticError):
        embed_sets(numbered_model(Encode(stop_after=3)), [(source, config())], tmp_path)
    (tmp_path / "things" / "parts" / "begun.json").write_text("{")
    with pytest.raises(ValueError, match=r"begun\.json': is damaged .*overwrite true"):
        embed_sets(numbered_model(), [(source, config())], tmp_path)


def test_another_model_or_source_is_refused(tmp_path, source):
    embed(numbered_model(), EmbeddingSource.of_labelled(LabelledNumbers(9)), config(), tmp_path)
    other = numbered_model(fingerprint="weights 1")
    with pytest.raises(ValueError, match="model fingerprint = 'weights 1'"):
        embed(other, EmbeddingSource.of_labelled(LabelledNumbers(9)), config(), tmp_path)
    with pytest.raises(ValueError, match="source fingerprint"):
        embed(numbered_model(), source, config(), tmp_path)


def test_too_many_unreadable_images_stop_it_and_a_larger_share_resumes(tmp_path, source):
    with pytest.raises(TooManyBadSamples, match=r"embedding.max_bad_share = 0.05: 4 of 43 samples of set things"):
        embed(numbered_model(), source, config(max_bad_share=0.05), tmp_path)
    assert embed(numbered_model(), source, config(), tmp_path).manifest["rows"]["image"] == 39
    nothing = EmbeddingSource.of_labelled(LabelledNumbers(6, broken=tuple(range(6))))
    with pytest.raises(ValueError, match="set = 'numbers': none of its 6 samples could be used"):
        embed(numbered_model(), nothing, config(max_bad_share=1.0), tmp_path / "none")


def test_augmented_views_belong_to_images_not_to_batches(tmp_path, source):
    few, many = (
        embed(numbered_model(), source, config(batch=batch, **more), tmp_path / str(batch))
        for batch, more in ((4, {}), (9, {"part_batches": 1}))
    )
    np.testing.assert_array_equal(few.rows("image_augmented"), many.rows("image_augmented"))
    other = embed(numbered_model(), source, config(seed=1), tmp_path / "seed")
    assert (few.rows("image_augmented") != other.rows("image_augmented")).any()
    np.testing.assert_array_equal(few.rows("image"), other.rows("image"))


def test_an_array_that_the_model_lacks_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"embedding.arrays = 'image_independent': look up does not make it; it makes"):
        embed(numbered_model(), source, config(arrays=["image_independent"]), tmp_path)
    with pytest.raises(ValueError, match=r"embedding.arrays = 'pixels': may be image, image_features"):
        embed(numbered_model(), source, config(arrays=["pixels"]), tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b"])
def test_a_set_is_named_as_a_folder_can_be(name):
    with pytest.raises(ValueError, match="a folder is called by it"):
        EmbeddingSource(name, LabelledNumbers(3), "fingerprint")


def test_loader_workers_change_nothing(tmp_path, samples):
    source = EmbeddingSource.of_samples("things", samples)
    for workers in (0, 1):
        embed(numbered_model(), source, config(workers=workers), tmp_path / str(workers))
    assert content(tmp_path / "0") == content(tmp_path / "1")
