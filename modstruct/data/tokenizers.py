"""Tokenizers, from captions to ids: sentencepiece, CLIP's BPE and BERT's WordPiece behind one interface.

Each is built from the bytes of one model file, so that it can be saved into a checkpoint, sent to a loader process and
rebuilt anywhere. The row of a caption is: start id, ids of its tokens, end id, padding. Long text loses tokens at
its end, never the end id. Padding has an id of its own. No text produces the start, end or padding id, not even one
that spells them out.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modstruct.config import TokenizerConfig
from modstruct.data.sentencepiece_training import TRAINING_SETTINGS, train_sentencepiece
from modstruct.errors import refuse, require
from modstruct.files import atomic_write, locked

DESCRIPTION_FILE = "tokenizer.json"
# Text beyond this many characters per token of context is cut before encoding: no real caption's ids change, and a
# caption of megabytes costs no more than a long one.
CHARACTERS_PER_TOKEN = 64
LONGEST_CONTEXT = 1 << 16  # tokens
INSIDE_A_NUMBER = re.compile(r"(?<=\d) ([.,:/]) (?=\d)")
WORDS_KEPT = 1 << 16  # of CLIP's tokenizer, with their ids: some 16 MB
LARGEST_MERGES_BYTES = 1 << 24  # unpacked; CLIP's own take a fifth


class Tokenizer(ABC):
    """Turns captions into ids; the subclasses differ in how a text becomes pieces.

    vocab_size counts every id that can occur, padding included. Ids lie in [0, vocab_size).
    """

    kind: str
    model_file: str
    vocab_size: int
    padding_id: int
    start_id: int
    end_id: int

    def __init__(self, model: bytes, context_length: int):
        """model: content of the model file. context_length: tokens of a row, start and end included; at least 3."""
        fits = 3 <= context_length <= LONGEST_CONTEXT
        require(fits, "tokenizer.context_length", context_length, f"from 3 to {LONGEST_CONTEXT:,}")
        self.model = model
        self.context_length = context_length

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of a text that is valid Unicode, without start, end and padding."""

    def _encode_all(self, texts: list[str]) -> Iterable[list[int]]:
        """The same of several texts."""
        return map(self._encode, texts)

    @abstractmethod
    def _piece(self, token_id: int) -> str:
        """The piece of text that an id of `_encode` stands for."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The text of ids that `_encode` can give."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, context_length), int64, of B texts. Any Unicode is accepted; an empty text becomes start, end."""
        if isinstance(texts, str):
            raise TypeError(f"a tokenizer takes a list of texts, not one text: give [{texts[:40]!r}]")
        rows = []
        for ids in self._encode_all([self._clean(text) for text in texts]):
            ids = ids[: self.context_length - 2]
            padding = [self.padding_id] * (self.context_length - 2 - len(ids))
            rows.append([self.start_id, *ids, self.end_id, *padding])
        # numpy takes half the time of torch.tensor for lists.
        return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(rows), self.context_length))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a row of ids, as a model generates them, up to the first end id; undoes `__call__` as it can.

        ids: any in [0, ids_with_mask). Start, padding and mask tokens are left out; whitespace becomes single spaces.
        """
        ids = list(ids)
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        silent = {self.start_id, self.padding_id, self.mask_id}
        return " ".join(self._text([token_id for token_id in ids if token_id not in silent]).split())

    @property
    def mask_id(self) -> int:
        """The mask token of masked language modelling: the vocabulary's own, or the id after all others."""
        return self.vocab_size

    @property
    def ids_with_mask(self) -> int:
        """Ids that can occur, the mask token included."""
        return max(self.vocab_size, self.mask_id + 1)

    def mask(self, ids: Tensor) -> Tensor:
        """True where ids, of any shape, are not padding."""
        return ids != self.padding_id

    def segment(self, text: str) -> list[str]:
        """The pieces that a text is cut into, for display; not cut to the context length."""
        return [self._piece(token_id) for token_id in self._encode(self._clean(text))]

    def save(self, folder: str | Path) -> None:
        """Write the model file and a JSON description into folder: all that `load_tokenizer` needs."""
        folder = Path(folder)
        description = json.dumps(self._description(), indent=2) + "\n"
        for name, content in ((self.model_file, self.model), (DESCRIPTION_FILE, description.encode())):
            with atomic_write(folder / name) as file:
                file.write(content)

    def _description(self) -> dict[str, object]:
        numbers = ("context_length", "vocab_size", "padding_id", "start_id", "end_id")
        return {
            "kind": self.kind,
            **{name: getattr(self, name) for name in numbers},
            "sha256": hashlib.sha256(self.model).hexdigest(),
        }

    def _clean(self, text: str) -> str:
        longest = CHARACTERS_PER_TOKEN * self.context_length
        if len(text) > longest:
            text = " ".join(text.split())[:longest]
        # A lone surrogate is valid in a str but not in UTF-8: the libraries below raise on it.
        return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, int]]:
        return type(self), (self.model, self.context_length)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model (Kudo & Richardson 2018), ours or the user's.

    Padding, start and end are control symbols of the model. Where a model lacks one, it gets an id of its own after the
    model's last.
    """

    kind = "sentencepiece"
    model_file = "sentencepiece.model"

    def __init__(self, model: bytes, context_length: int):
        import sentencepiece

        super().__init__(model, context_length)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("not a sentencepiece model") from error
        if not loaded or self._processor.get_piece_size() == 0:
            raise ValueError("not a sentencepiece model, or one without pieces")
        self.vocab_size = self._processor.get_piece_size()
        self.padding_id = self._own_id(self._processor.pad_id())
        self.start_id = self._own_id(self._processor.bos_id())
        self.end_id = self._own_id(self._processor.eos_id())

    def _own_id(self, token_id: int) -> int:
        # sentencepiece returns -1 for a symbol that the model lacks, or that it would also read from text.
        if token_id >= 0:
            return token_id
        self.vocab_size += 1
        return self.vocab_size - 1

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def _piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def _text(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding (Radford et al. 2021) through open_clip, with a padding id of its own.

    CLIP pads with 0, the id of "!". Here padding is 49408, the first id after CLIP's vocabulary of 49,408.
    """

    kind = "clip_bpe"
    model_file = "bpe_simple_vocab_16e6.txt.gz"

    def __init__(self, model: bytes, context_length: int):
        from open_clip.tokenizer import SimpleTokenizer

        super().__init__(model, context_length)
        try:
            unpacked = zlib.decompressobj(wbits=31).decompress(model, LARGEST_MERGES_BYTES)
            if len(unpacked) == LARGEST_MERGES_BYTES:  # open_clip would unpack it whole
                raise ValueError(f"more than {LARGEST_MERGES_BYTES >> 20} MiB unpacked")
            self._tokenizer = SimpleTokenizer(bpe_path=io.BytesIO(model))
        except Exception as error:  # a damaged file raises nearly anything, from zlib.error to IndexError
            raise ValueError(f"not CLIP's merges ({type(error).__name__}: {error})") from error
        self._clean_text = partial(_clean_if_need_be, self._tokenizer.clean_fn)
        self._ids_of_word = lru_cache(maxsize=WORDS_KEPT)(self._encode_word)
        self.start_id = self._tokenizer.sot_token_id
        self.end_id = self._tokenizer.eot_token_id
        self.padding_id = self._tokenizer.vocab_size
        self.vocab_size = self._tokenizer.vocab_size + 1

    @classmethod
    def shipped_model(cls) -> bytes:
        """The merges that come with open_clip."""
        from open_clip.tokenizer import default_bpe

        return Path(default_bpe()).read_bytes()

    def _encode(self, text: str) -> list[int]:
        # The steps of open_clip's encode.
        words = self._tokenizer.pat.findall(self._clean_text(text))
        return list(chain.from_iterable(map(self._ids_of_word, words)))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        letters = "".join(self._tokenizer.byte_encoder[byte] for byte in word.encode())
        ids = tuple(self._tokenizer.encoder[piece] for piece in self._tokenizer.bpe(letters).split(" "))
        if ids in ((self.start_id,), (self.end_id,)):
            return ()  # open_clip reads a spelled-out <end_of_text> as the token, which would end the caption there
        self._tokenizer.cache.pop(letters, None)  # where open_clip keeps every word that ever came
        return ids

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all pieces, start and end token last."""
        return self._tokenizer.encoder

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces that are joined, the first before the others."""
        return list(self._tokenizer.bpe_ranks)

    def _piece(self, token_id: int) -> str:
        return self._tokenizer.decoder[token_id]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _clean_if_need_be(clean: Callable[[str], str], text: str) -> str:
    """What open_clip's cleaning gives. ftfy and html, half of a caption's time, have nothing to mend in plain ASCII."""
    plain = text.isascii() and text.isprintable() and "&" not in text
    return " ".join(text.split()).lower() if plain else clean(text)


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece (Devlin et al. 2019) from a vocabulary file, one entry a line.

    Text is lower-cased and loses its accents unless some ordinary entry of the vocabulary has a capital letter A to Z,
    which is how cased and uncased vocabularies of BERT differ.
    """

    kind = "bert_wordpiece"
    model_file = "vocab.txt"

    def __init__(self, model: bytes, context_length: int):
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, normalizers, pre_tokenizers

        super().__init__(model, context_length)
        try:
            # Not splitlines(): the line separators of Unicode are entries of BERT's vocabularies.
            entries = [line.removesuffix("\r") for line in model.decode("utf-8").removesuffix("\n").split("\n")]
        except UnicodeDecodeError as error:
            raise ValueError("not a vocabulary file: it must be UTF-8 text, one entry a line") from error
        vocabulary = {entry: token_id for token_id, entry in enumerate(entries)}
        missing = [entry for entry in ("[PAD]", "[CLS]", "[SEP]", "[UNK]") if entry not in vocabulary]
        if missing:
            raise ValueError(f"not a vocabulary of BERT's: it lacks the entries {', '.join(missing)}")
        self.vocab_size = len(entries)
        self.padding_id, self.start_id, self.end_id = (vocabulary[entry] for entry in ("[PAD]", "[CLS]", "[SEP]"))
        self._mask_id = vocabulary.get("[MASK]", self.vocab_size)
        cased = any(
            any("A" <= letter <= "Z" for letter in entry) for entry in vocabulary if not entry.startswith(("[", "<"))
        )
        # The special entries are not registered as such: a caption that spells "[PAD]" is three words, not padding.
        self.backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
        self.backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    @property
    def mask_id(self) -> int:
        return self._mask_id

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _piece(self, token_id: int) -> str:
        return self.backend.id_to_token(token_id) or ""

    def _text(self, ids: list[int]) -> str:
        # Its pieces do not tell "it's" from "it ' s": joined as answers and captions mostly mean them.
        text = " ".join(self._piece(token_id) for token_id in ids).replace(" ##", "")
        return INSIDE_A_NUMBER.sub(r"\1", text.replace(" ' ", "'"))


KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (SentencePieceTokenizer, ClipTokenizer, WordPieceTokenizer)
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Rebuild the tokenizer that `Tokenizer.save` wrote into folder.

    Raises ValueError, naming the file and the remedy, where a file is missing, unreadable or not the one saved.
    """
    folder = Path(folder)
    remedy = "the checkpoint, export or tokenizer folder is damaged or incomplete: take another"
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_bytes())
        kind = KINDS[description["kind"]]
        model = (folder / kind.model_file).read_bytes()
        if hashlib.sha256(model).hexdigest() != description["sha256"]:
            refuse("tokenizer file", str(folder / kind.model_file), "it was changed after it was saved; restore it")
        tokenizer = kind(model, description["context_length"])
    except OSError as error:
        refuse("tokenizer folder", str(folder), f"{remedy} ({error})")
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        refuse("tokenizer file", str(folder / DESCRIPTION_FILE), f"{remedy} ({type(error).__name__}: {error})")
    changed = [name for name, value in tokenizer._description().items() if description.get(name) != value]
    if changed:
        refuse(
            "tokenizer file", str(folder / DESCRIPTION_FILE), f"{', '.join(changed)} do not belong to its model file"
        )
    return tokenizer


def build_tokenizer(
    config: TokenizerConfig, captions: Callable[[], Iterable[str]], cache: str | Path, source_fingerprint: str
) -> Tokenizer:
    """The tokenizer that a recipe describes.

    A sentencepiece tokenizer without a path is trained on captions() at first use and kept in cache/tokenizers, under a
    hash of its training settings and of source_fingerprint, which identifies the captions. Of several processes at once
    one trains and the others wait. Raises ValueError naming tokenizer.path where a file is missing or wrong.
    """
    kind = KINDS[config.kind]
    if kind is ClipTokenizer:
        require(config.path is None, "tokenizer.path", config.path, "null: clip_bpe has a vocabulary of its own")
        return ClipTokenizer(ClipTokenizer.shipped_model(), config.context_length)
    if config.path is None:
        return _trained_tokenizer(config, captions, Path(cache).expanduser(), source_fingerprint)
    path = Path(config.path).expanduser()
    if path.is_dir():
        path = path / kind.model_file
    try:
        return kind(path.read_bytes(), config.context_length)
    except OSError as error:
        refuse("tokenizer.path", str(path), f"give a file that can be read ({error.strerror})")
    except ValueError as error:
        refuse("tokenizer.path", str(path), str(error))


def _trained_tokenizer(
    config: TokenizerConfig, captions: Callable[[], Iterable[str]], cache: Path, source_fingerprint: str
) -> Tokenizer:
    # Training does not depend on the context length, so runs that differ in it alone share the model.
    identity = json.dumps([TRAINING_SETTINGS, config.vocab_size, source_fingerprint], sort_keys=True)
    folder = cache / "tokenizers" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    # One that is there needs no lock: a prepared cache may be read-only.
    with nullcontext() if folder.exists() else locked(folder.with_suffix(".lock")):
        if not folder.exists():
            print(f"Training a sentencepiece tokenizer on the captions, once; it is kept in {folder}", flush=True)
            model = train_sentencepiece(captions(), config.vocab_size)
            tokenizer = SentencePieceTokenizer(model, config.context_length)
            _save_whole(tokenizer, folder)
            print(f"The tokenizer has {tokenizer.vocab_size} pieces of at most {config.vocab_size}", flush=True)
    try:
        return SentencePieceTokenizer(load_tokenizer(folder).model, config.context_length)
    except ValueError as error:
        refuse("data.cache", str(folder), f"this cached tokenizer is damaged, delete its folder ({error})")


def _save_whole(tokenizer: Tokenizer, folder: Path) -> None:
    """Save atomically: the folder is complete or missing, even where the file system has no locks."""
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
    try:
        tokenizer.save(part)
        part.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
