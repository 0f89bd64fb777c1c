"""A source embedded in memory, as training does: in its order, captions merged, bad samples left out."""

from __future__ import annotations

import numpy as np
import pytest
from numbered_images import CLASS_FILE, LastNumberTokenizer, LookUp, views, write_source

from modstruct.config.training import EmbeddingConfig
from modstruct.data.classification.class_files import load_classes
from modstruct.data.faults import TooManyBadSamples
from modstruct.evaluation.embeddings.embed import embed, embed_texts
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.source import EmbeddingSource


def embedded(samples, encode=None, batch=4, classes=None):
    model = EmbeddingModel(encode=encode or LookUp(), views=views(), tokenize=LastNumberTokenizer())
    limits = samples.config
    settings = EmbeddingConfig(dtype="float32", batch=batch, workers=0, max_bad_share=limits.max_bad_share)
    return embed(model, EmbeddingSource.of_samples("eval", samples, classes, "data.eval"), settings)


def test_rows_keep_the_order_of_the_source_and_equal_images_and_captions_are_one_row(tmp_path):
    numbers = [7, 3, 7, 9, 30, 12]
    distinct = [7, 3, 9, 30, 12]
    source = embedded(write_source(tmp_path, numbers, lambda n: [f"thing {n}", f"object {n}", f"thing {n}"]))
    encode = LookUp()
    assert source.captions == [f"{word} {n}" for n in distinct for word in ("thing", "object")]
    np.testing.assert_array_equal(source.distinct_rows("image"), encode.image_table[distinct])
    np.testing.assert_array_equal(source.rows("text"), encode.text_table[[n for n in distinct for _ in range(2)]])
    assert (source.indices.tolist(), source.copies.tolist()) == ([0, 1, 3, 4, 5, 2], [0])
    of_text = [int(text.split()[-1]) for text in source.captions]
    expected = {(i, t) for i, number in enumerate(distinct) for t, other in enumerate(of_text) if number == other}
    assert {tuple(pair) for pair in source.distinct_pairs.tolist()} == expected
    assert len(source.distinct_pairs) == len(expected)


def test_samples_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    class_file = tmp_path / "classes.yaml"
    class_file.write_text(CLASS_FILE)
    source = embedded(
        write_source(tmp_path, list(range(60)), broken=(4, 5, 6, 7, 20)), classes=load_classes(class_file)
    )
    kept = [i for i in range(60) if i not in (4, 5, 6, 7, 20)]  # the second batch of four is bad as a whole
    assert source.indices.tolist() == kept
    np.testing.assert_array_equal(source.rows("image"), LookUp().image_table[kept])
    assert source.captions == [f"thing {n}" for n in kept]
    assert source.labels.tolist() == [n % 2 for n in kept]
    assert source.manifest["skipped"] == {"undecodable image": 5}


def test_a_source_with_too_many_bad_samples_is_refused(tmp_path):
    with pytest.raises(TooManyBadSamples, match=r"data.max_bad_share = 0.1: 8 of 40 samples of data.eval"):
        embedded(write_source(tmp_path / "many", list(range(40)), broken=range(30)))
    with pytest.raises(TooManyBadSamples, match="3 of 20 samples"):
        embedded(write_source(tmp_path / "small", list(range(20)), broken=range(3)))
    assert embedded(write_source(tmp_path / "allowed", list(range(20)), broken=range(2))).manifest["skipped"]


def test_texts_are_embedded_in_batches_and_keep_their_order():
    encode = LookUp()
    texts = [f"thing {n}" for n in range(10)]
    rows = embed_texts(encode, texts, LastNumberTokenizer(), 4, "")
    np.testing.assert_array_equal(rows, encode.text_table[:10])
    assert encode.calls == [("text", 4), ("text", 4), ("text", 2)]
