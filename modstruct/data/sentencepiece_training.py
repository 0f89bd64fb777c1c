"""Trains the sentencepiece model of a run from scratch: the same captions give the same bytes, in any language."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

from modstruct.errors import refuse

# Lower-cased and NFKC-normalised, as CLIP's own text is: case says next to nothing about an image.
NORMALIZATION = "nmt_nfkc_cf"
# Not unigram, whose pieces are what different words share: the 200 words of the built-in scenes fell apart into letters
# (35 tokens a caption, byte-pair encoding makes 21).
MODEL_TYPE = "bpe"
SPECIAL_IDS = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
# With byte fallback every character can be written, for 256 ids, an eighth of this vocabulary. In one of 1,024 the lost
# pieces make captions 9 % longer (seen on the emoji captions); there rare characters become the unknown piece.
SMALLEST_VOCABULARY_WITH_BYTES = 2048
CHARACTER_COVERAGE = 0.9995
MOST_CHARACTERS = 1_000  # of a caption

# Captions that suffice for any vocabulary; give the trainer no more, evenly spaced over the source.
TRAINING_CAPTIONS = 500_000

# What the model depends on besides the captions and the size; part of a cached tokenizer's name.
TRAINING_SETTINGS = {
    "algorithm": MODEL_TYPE,
    "normalization": NORMALIZATION,
    "special_ids": SPECIAL_IDS,
    "smallest_vocabulary_with_bytes": SMALLEST_VOCABULARY_WITH_BYTES,
    "character_coverage": CHARACTER_COVERAGE,
    "most_characters": MOST_CHARACTERS,
}


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> bytes:
    """Bytes of a byte-pair-encoding model (Sennrich et al. 2016) of at most vocab_size pieces, special ones included.

    Captions too few for that many pieces give a smaller model. All captions are held in memory and used. Raises
    ValueError if there is none to learn from.
    """
    import sentencepiece

    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=NORMALIZATION)
    cut = (caption[:MOST_CHARACTERS].encode("utf-8", "replace").decode("utf-8") for caption in captions)
    texts = [normalizer.normalize(text) for text in cut]
    counts = Counter(character for text in texts for character in text)
    counts.pop(" ", None)
    if not counts:
        refuse("data.train", "captions", "none of the source's captions holds any text to train a tokenizer on")

    byte_fallback = vocab_size >= SMALLEST_VOCABULARY_WITH_BYTES
    room = vocab_size - len(SPECIAL_IDS) - (256 if byte_fallback else 0)
    # sentencepiece stops where the characters alone fill the vocabulary (Chinese, small sizes): the rare ones are left
    # out of training, and bytes or the unknown piece stand for them.
    kept = _alphabet(counts, most=max(1, room // 2))
    if len(kept) < len(counts):
        texts = ["".join(c if c == " " or c in kept else " " for c in text) for text in texts]

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=MODEL_TYPE,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=byte_fallback,
            character_coverage=1.0,
            normalization_rule_name=NORMALIZATION,
            max_sentence_length=8 * MOST_CHARACTERS,
            num_threads=1,  # sums of several threads depend on their number
            minloglevel=2,
            pad_id=SPECIAL_IDS["pad_id"],
            unk_id=SPECIAL_IDS["unk_id"],
            bos_id=SPECIAL_IDS["bos_id"],
            eos_id=SPECIAL_IDS["eos_id"],
        )
    except RuntimeError as error:
        refuse("tokenizer.vocab_size", vocab_size, f"sentencepiece cannot train on these captions ({error})")
    return model.getvalue()


def _alphabet(counts: Counter[str], most: int) -> set[str]:
    """The commonest characters that make up CHARACTER_COVERAGE of the text, `most` at most."""
    enough = CHARACTER_COVERAGE * counts.total()
    kept: set[str] = set()
    covered = 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) == most or covered >= enough:
            break
        kept.add(character)
        covered += count
    return kept
