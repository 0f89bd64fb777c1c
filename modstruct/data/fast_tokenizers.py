"""Our tokenizers in the form that the `tokenizers` library and transformers read: the same ids, without modstruct."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from tokenizers import AddedToken, Regex, normalizers, processors
from tokenizers import Tokenizer as Backend

from modstruct.data.tokenizers import ClipTokenizer, SentencePieceTokenizer, Tokenizer, WordPieceTokenizer
from modstruct.errors import refuse

TEXTS = (
    *("", "a", "A photo of a dog.", "two red discs and a yellow star, 3.5 cm", "it's  the cat's\tpyjamas \n", "!!!"),
    *(
        "Ein Mädchen mit Hüten \u2013 \u201cnaïve café\u201d, l\u2019été",
        "東京の夜景 2024",
        "НЕБО и море",
        "🙂🚀 emoji",
        "a\u00a0b\u200bc",
    ),
    *("x" * 70, "star " * 200, "C++/CUDA_kernel-v2 (50%) #1 @home", "'Tis <b>not</b> [bracketed] {text}|~^"),
)
"""What both must read alike."""
QUOTES = {"[\u2018\u2019]": "'", "[\u201c\u201d]": '"'}
"""Typographic quotes, of which open_clip's cleaning makes plain ones."""


def fast_tokenizer(tokenizer: Tokenizer) -> tuple[Backend, dict[str, str]]:
    """A tokenizer whose rows are those of ours, padding included, and its tokens by transformers' names for them.

    Not done is what open_clip does to a text before CLIP's vocabulary (ftfy, HTML's entities), but for typographic
    quotes. Raises ValueError where a text of TEXTS would be read otherwise.
    """
    match tokenizer:
        case ClipTokenizer():
            backend = _clip(tokenizer)
        case WordPieceTokenizer():
            backend = copy.deepcopy(tokenizer.backend)
        case SentencePieceTokenizer():
            backend = _sentencepiece(tokenizer)
        case _:
            raise TypeError(f"no such form of a {type(tokenizer).__name__}")
    ids = {"bos_token": tokenizer.start_id, "eos_token": tokenizer.end_id, "pad_token": tokenizer.padding_id}
    for name, token_id in sorted(ids.items(), key=lambda entry: entry[1]):
        if backend.id_to_token(token_id) is None:  # of ours alone: they follow the vocabulary's last
            backend.add_tokens([AddedToken(f"<|{name}|>", special=True)])
    tokens = {name: str(backend.id_to_token(token_id)) for name, token_id in ids.items()}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{tokens['bos_token']} $A {tokens['eos_token']}",
        special_tokens=[(tokens[name], ids[name]) for name in ("bos_token", "eos_token")],
    )
    backend.enable_truncation(tokenizer.context_length)
    backend.enable_padding(length=tokenizer.context_length, pad_id=ids["pad_token"], pad_token=tokens["pad_token"])
    ours = tokenizer(TEXTS)
    theirs = torch.tensor([encoding.ids for encoding in backend.encode_batch(list(TEXTS))])
    for text, row, other in zip(TEXTS, ours, theirs, strict=True):
        if not torch.equal(row, other):
            refuse("tokenizer", text, f"the `tokenizers` library would read it as {other.tolist()}, not {row.tolist()}")
    return backend, tokens


def _clip(tokenizer: ClipTokenizer) -> Backend:
    """Byte-pair encoding as transformers' CLIPTokenizer has it."""
    from transformers import CLIPTokenizer

    vocabulary = dict(tokenizer.vocabulary)
    for token, token_id in (("<|startoftext|>", tokenizer.start_id), ("<|endoftext|>", tokenizer.end_id)):
        vocabulary = {token if known == token_id else piece: known for piece, known in vocabulary.items()}
    backend: Any = CLIPTokenizer(vocab=vocabulary, merges=cast(list[str], tokenizer.merges)).backend_tokenizer
    plain = [normalizers.Replace(Regex(pattern), quote) for pattern, quote in QUOTES.items()]
    backend.normalizer = normalizers.Sequence([*plain, backend.normalizer, normalizers.Strip()])
    return backend


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Backend:
    from sentencepiece import sentencepiece_model_pb2
    from transformers.convert_slow_tokenizer import SpmConverter

    proto = cast(Any, sentencepiece_model_pb2).ModelProto.FromString(tokenizer.model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    bpe = proto.trainer_spec.model_type == 2
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)} if bpe else pieces
    try:
        return SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    except (AttributeError, TypeError):
        refuse("tokenizer", "sentencepiece", "this version of transformers cannot convert it; 5.24 can: pip install -U")
