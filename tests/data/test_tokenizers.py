"""Tokenizers: rows of ids that end, pad and travel as they should, whatever the text; training that repeats itself."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import runpy
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modstruct.config import TokenizerConfig
from modstruct.data import tokenizers
from modstruct.data.sentencepiece_training import train_sentencepiece
from modstruct.data.tokenizers import (
    KINDS,
    ClipTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    build_tokenizer,
    load_tokenizer,
)

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
CONTEXT = 12
LONG = "a red square above two blue circles " * 30
SPELLED = ["<pad>", "</s> <s>", "[PAD]", "[CLS] [SEP]", "<start_of_text>", "<end_of_text>", "<|endoftext|>", "<0x00>"]
SPECIAL_ENTRIES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL_ENTRIES, *"abcde!,", "##a", "##b", "##c", "##d", "red", "square", "cafe"]


def scene_captions(count: int) -> list[str]:
    draw = random.Random(5)
    colours, shapes, places = ["red", "blue", "green"], ["circle", "square", "star"], ["left", "right", "middle"]
    return [
        f"A {draw.choice(colours)} {draw.choice(shapes)} on the {draw.choice(places)}, number {draw.randrange(99)}"
        for _ in range(count)
    ]


@cache
def trained_model() -> bytes:
    return train_sentencepiece(scene_captions(300), 2048)


def tokenizer_of(kind: str) -> Tokenizer:
    models = {
        "sentencepiece": trained_model,
        "clip_bpe": ClipTokenizer.shipped_model,
        "bert_wordpiece": lambda: "\n".join(VOCABULARY).encode(),
    }
    return KINDS[kind](models[kind](), CONTEXT)


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request) -> Tokenizer:
    return tokenizer_of(request.param)


def assert_well_formed(tokenizer: Tokenizer, ids: torch.Tensor) -> None:
    assert ids.dtype == torch.int64
    assert ids.shape[1] == tokenizer.context_length
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    for row in ids.tolist():
        end = row.index(tokenizer.end_id)
        assert row[0] == tokenizer.start_id
        assert set(row[end + 1 :]) <= {tokenizer.padding_id}
        assert not {tokenizer.start_id, tokenizer.end_id, tokenizer.padding_id} & set(row[1:end])


@given(texts=st.lists(st.text(st.characters(), max_size=60), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_becomes_start_pieces_end_padding(tokenizer, texts):
    ids = tokenizer(texts)
    assert ids.shape[0] == len(texts)
    assert_well_formed(tokenizer, ids)


@pytest.mark.parametrize("text", ["\ud800 lone surrogate", "\x00", "\u2028", "😀" * 500, *SPELLED, " \t\n ", "!" * 99])
def test_odd_texts_are_no_error_and_give_no_special_id(tokenizer, text):
    assert_well_formed(tokenizer, tokenizer([text, "a red square"]))


def test_special_ids_are_distinct_and_in_the_vocabulary(tokenizer):
    special = {tokenizer.padding_id, tokenizer.start_id, tokenizer.end_id}
    assert len(special) == 3
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in special)


def test_long_text_keeps_its_first_tokens_and_the_end_token(tokenizer):
    longer = type(tokenizer)(tokenizer.model, 2 * CONTEXT)
    (short,), (long,) = tokenizer([LONG]).tolist(), longer([LONG]).tolist()
    assert short == [*long[: CONTEXT - 1], tokenizer.end_id]
    assert long[-1] == tokenizer.end_id


def test_a_text_of_megabytes_is_as_quick_as_a_long_one(tokenizer):
    # Without a cut the byte-pair merges of one word of this length take hours.
    assert_well_formed(tokenizer, tokenizer(["x" * 5_000_000, " " * 5_000_000 + "a red square"]))
    assert torch.equal(tokenizer([" " * 5_000_000 + "a"]), tokenizer(["a"]))


def test_empty_text_is_start_end_and_no_text_is_no_row(tokenizer):
    assert tokenizer([""]).tolist() == [[tokenizer.start_id, tokenizer.end_id] + [tokenizer.padding_id] * (CONTEXT - 2)]
    assert tokenizer([]).shape == (0, CONTEXT)


def test_one_text_instead_of_a_list_is_refused(tokenizer):
    with pytest.raises(TypeError, match="list of texts"):
        tokenizer("a red square")


def test_mask_is_true_up_to_the_end_token(tokenizer):
    ids = tokenizer(["a red square", "", LONG])
    lengths = (ids == tokenizer.end_id).long().argmax(dim=1) + 1
    assert torch.equal(tokenizer.mask(ids), torch.arange(CONTEXT) < lengths[:, None])


def test_ids_do_not_depend_on_the_batch(tokenizer):
    texts = ["a red square", LONG, "", "café"]
    assert torch.equal(tokenizer(texts), torch.cat([tokenizer([text]) for text in texts]))


def test_decoding_undoes_encoding_up_to_case_and_spaces(tokenizer):
    texts = ["a red square", "red", "", "abcd", "a,  b! c"]
    found = [tokenizer.decode(row) for row in tokenizer(texts).tolist()]
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in texts]
    assert found[:4] == texts[:4]


def test_decoding_stops_at_the_end_and_keeps_silent_of_what_is_no_text(tokenizer):
    red = tokenizer(["red"])[0].tolist()
    red = red[1 : red.index(tokenizer.end_id)]
    silent = [tokenizer.start_id, tokenizer.padding_id, tokenizer.mask_id]
    assert tokenizer.decode([*silent, *red, *silent, tokenizer.end_id, *red]) == "red"
    assert tokenizer.decode([*silent, *red]) == "red"


@pytest.mark.parametrize("text", ["it's 10:30", "2.5", "1,000", "man's hat", "1/2"])
def test_wordpiece_decodes_answers_as_they_were_written(text):
    words = ["it", "'", "s", "10", ":", "30", "2", ".", "5", "1", ",", "000", "man", "hat", "/"]
    tokenizer = WordPieceTokenizer("\n".join([*SPECIAL_ENTRIES, *words]).encode(), CONTEXT)
    assert tokenizer.decode(tokenizer([text])[0].tolist()) == text


def test_saved_and_pickled_tokenizers_give_the_same_ids(tokenizer, tmp_path):
    texts = [*scene_captions(20), LONG, "", "naïve Ⅲ 猫"]
    tokenizer.save(tmp_path / "tokenizer")
    for copy in (load_tokenizer(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer)
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.padding_id == tokenizer.padding_id
        assert torch.equal(copy(texts), tokenizer(texts))


def test_saved_folder_stands_alone(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(VOCABULARY))
    config = TokenizerConfig(kind="bert_wordpiece", path=str(file), context_length=CONTEXT)
    built = build_tokenizer(config, list, tmp_path, "")
    built.save(tmp_path / "saved")
    file.unlink()
    assert torch.equal(load_tokenizer(tmp_path / "saved")(["a red square"]), built(["a red square"]))


def test_tampered_model_file_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / tokenizer.model_file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="changed after it was saved"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change", [{"padding_id": 7}, {"kind": "unknown"}, {"kind": None}, {"context_length": "x"}, {"sha256": ""}]
)
def test_tampered_description_is_refused(change, tmp_path):
    tokenizer_of("bert_wordpiece").save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"tokenizer(\.json|\.context_length| file)"):
        load_tokenizer(tmp_path)


def test_missing_or_malformed_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    for content in ("not json", "[]", "{}"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json.*damaged or incomplete: take another"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "bert_wordpiece"])
@pytest.mark.parametrize("content", [None, b"", b"junk", b"\xff\xfe\x00", b"[PAD]\n[UNK]\nred\n"])
def test_wrong_or_missing_file_is_an_error_that_names_tokenizer_path(kind, content, tmp_path):
    file = tmp_path / "model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^tokenizer\.path"):
        build_tokenizer(TokenizerConfig(kind=kind, path=str(file)), list, tmp_path, "")


def test_vocabulary_without_special_entries_is_refused_by_their_names(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\nred\n")
    with pytest.raises(ValueError, match=r"\[CLS\], \[SEP\]"):
        build_tokenizer(TokenizerConfig(kind="bert_wordpiece", path=str(file)), list, tmp_path, "")


def test_clip_refuses_a_path(tmp_path):
    with pytest.raises(ValueError, match=r"^tokenizer\.path"):
        build_tokenizer(TokenizerConfig(kind="clip_bpe", path="somewhere"), list, tmp_path, "")


def test_clip_agrees_with_open_clip_and_pads_with_an_id_of_its_own(tmp_path):
    from open_clip.tokenizer import SimpleTokenizer

    texts = ["a photo of a cat!", "!!!", LONG, "Ünïcode"]
    tokenizer = build_tokenizer(TokenizerConfig(kind="clip_bpe", context_length=CONTEXT), list, tmp_path, "")
    ids, theirs = tokenizer(texts), SimpleTokenizer()(texts, context_length=CONTEXT)
    assert (tokenizer.padding_id, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)
    assert tokenizer.vocab_size == 49409
    assert torch.equal(torch.where(tokenizer.mask(ids), ids, 0), theirs)


@cache
def clip_beside_open_clip() -> tuple[ClipTokenizer, Callable[[str], list[int]]]:
    from open_clip.tokenizer import SimpleTokenizer

    return ClipTokenizer(ClipTokenizer.shipped_model(), CONTEXT), SimpleTokenizer().encode


PIECES = ["&lt;", "&amp;lt;", "&#x27;", "&eacute", "&", "A b", " ", "\x1b[0m", "\t", "\x7f", "é", "<"]
PIECES += ["<end_of_text>", "<start_of_text>", "'s", "42", "東京"]
ASCII = st.characters(max_codepoint=127)


@given(st.one_of(st.text(ASCII), st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_clip_reads_as_open_clip_does(text):
    ours, theirs = clip_beside_open_clip()
    text = ours._clean(text)
    assert ours._encode(text) == [token for token in theirs(text) if token < ours.start_id]


def test_clip_keeps_a_limited_number_of_words(monkeypatch):
    monkeypatch.setattr(tokenizers, "WORDS_KEPT", 8)
    tokenizer = ClipTokenizer(ClipTokenizer.shipped_model(), CONTEXT)
    first = tokenizer([f"word{number:03d}xyz" for number in range(100)])
    assert torch.equal(tokenizer([f"word{number:03d}xyz" for number in range(100)]), first)
    assert tokenizer._ids_of_word.cache_info().currsize == 8
    assert len(tokenizer._tokenizer.cache) == 2  # open_clip's own, of its special tokens


def test_wordpiece_agrees_with_transformers(tmp_path):
    from transformers import BertTokenizer

    texts = ["A red square!", "abcd, badc", "Café", "zebra", LONG]
    theirs = BertTokenizer(vocab={entry: token_id for token_id, entry in enumerate(VOCABULARY)})
    expected = theirs(texts, padding="max_length", truncation=True, max_length=CONTEXT)["input_ids"]
    assert tokenizer_of("bert_wordpiece")(texts).tolist() == expected


def test_wordpiece_keeps_case_where_the_vocabulary_has_capitals():
    cased = WordPieceTokenizer("\n".join([*VOCABULARY, "Red"]).encode(), CONTEXT)
    assert cased.segment("Red red") == ["Red", "red"]
    assert tokenizer_of("bert_wordpiece").segment("Red red") == ["red", "red"]


def test_wordpiece_ids_are_line_numbers_even_past_odd_line_separators():
    lines = ["[PAD]", "\u2028", "\x85", "[UNK]", "[CLS]", "[SEP]", "red"]
    tokenizer = WordPieceTokenizer(("\r\n".join(lines) + "\r\n").encode(), CONTEXT)
    assert tokenizer.vocab_size == len(lines)
    assert tokenizer(["red"])[0, :3].tolist() == [4, 6, 5]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(max_examples=100, deadline=None)
def test_sentencepiece_with_bytes_loses_nothing_but_what_normalisation_takes(text):
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained_model())
    normalized = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc_cf").normalize(text)
    assert processor.decode(processor.encode(text)) == normalized.replace("\u2581", " ").strip(" ")


def test_captions_of_either_case_and_spacing_are_the_same_to_sentencepiece():
    tokenizer = SentencePieceTokenizer(trained_model(), CONTEXT)
    assert torch.equal(tokenizer(["A  RED\nsquare "]), tokenizer(["a red square"]))


def test_a_users_model_without_padding_start_or_end_gets_ids_of_their_own():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(scene_captions(100)),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=-1,
        user_defined_symbols=["<s>"],  # text may spell this start symbol, so it cannot be one
    )
    tokenizer = SentencePieceTokenizer(model.getvalue(), CONTEXT)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    assert {tokenizer.padding_id, tokenizer.start_id} == {pieces, pieces + 1}
    assert tokenizer.end_id < pieces
    assert tokenizer.vocab_size == pieces + 2
    assert_well_formed(tokenizer, tokenizer(["a red <s> square", LONG]))


def test_training_repeats_itself_in_another_process():
    code = (
        "import sys, hashlib; sys.path[:0] = sys.argv[1:]\n"
        "from test_tokenizers import trained_model\n"
        "print(hashlib.sha256(trained_model()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, os.path.dirname(__file__), *[path for path in sys.path if path]]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.split()[-1] == hashlib.sha256(trained_model()).hexdigest()


CHINESE = ["".join(chr(0x4E00 + random.Random(i).randrange(3000)) for _ in range(9)) for i in range(400)]


@pytest.mark.parametrize("vocab_size", [64, 2047, 2048, 8192])
@pytest.mark.parametrize("captions", [scene_captions(50), CHINESE, ["a"], ["", "a cat", "\ud800\x00"], ["x" * 10**6]])
def test_any_captions_and_size_train_to_that_size_at_most(captions, vocab_size):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(captions, vocab_size), CONTEXT)
    assert tokenizer.vocab_size <= vocab_size
    assert_well_formed(tokenizer, tokenizer([*captions[:3], "猫 cat"]))


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_no_captions_are_refused(captions):
    with pytest.raises(ValueError, match="captions"):
        train_sentencepiece(captions, 512)


def test_trained_once_by_many_at_the_same_time_then_found(tmp_path, capsys):
    trainings = []

    def captions():
        trainings.append(threading.get_ident())
        time.sleep(0.2)  # long enough for the others to arrive
        return scene_captions(100)

    config = TokenizerConfig(vocab_size=300, context_length=CONTEXT)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build_tokenizer(config, captions, tmp_path, "source"), range(4)))
    assert len(trainings) == 1
    assert "tokenizer" in capsys.readouterr().out
    assert all(torch.equal(one(["a red star"]), built[0](["a red star"])) for one in built)

    longer = build_tokenizer(TokenizerConfig(vocab_size=300, context_length=40), captions, tmp_path, "source")
    assert (longer.context_length, longer.model, len(trainings)) == (40, built[0].model, 1)
    build_tokenizer(TokenizerConfig(vocab_size=200), captions, tmp_path, "source")
    build_tokenizer(config, captions, tmp_path, "another source")
    assert len(trainings) == 3
    assert not list((tmp_path / "tokenizers").glob("*.part"))


def test_interrupted_training_leaves_nothing_that_looks_complete(tmp_path):
    def interrupted():
        yield "a red square"
        raise KeyboardInterrupt

    config = TokenizerConfig(vocab_size=300, context_length=CONTEXT)
    with pytest.raises(KeyboardInterrupt):
        build_tokenizer(config, interrupted, tmp_path, "source")
    assert build_tokenizer(config, lambda: scene_captions(50), tmp_path, "source").vocab_size > 4


def test_damaged_cached_tokenizer_is_named(tmp_path):
    config = TokenizerConfig(vocab_size=300)
    build_tokenizer(config, lambda: scene_captions(50), tmp_path, "source")
    (model,) = (tmp_path / "tokenizers").glob("*/sentencepiece.model")
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete its folder"):
        build_tokenizer(config, lambda: scene_captions(50), tmp_path, "source")


def test_a_folder_serves_as_tokenizer_path(tmp_path):
    SentencePieceTokenizer(trained_model(), CONTEXT).save(tmp_path)
    built = build_tokenizer(TokenizerConfig(path=str(tmp_path), context_length=20), list, tmp_path, "")
    assert (built.model, built.context_length) == (trained_model(), 20)


def run_tool(*arguments: str) -> int:
    return runpy.run_path(str(TOOL))["main"](list(arguments))


def write_shard(path: Path, captions: list[str]) -> None:
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    with tarfile.open(path, "w") as shard:
        for key, caption in enumerate(captions):
            for extension, content in (("png", image.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key:04d}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def test_the_tool_trains_on_shards_and_says_what_came_out(tmp_path, capsys):
    write_shard(tmp_path / "shard-0.tar", scene_captions(50))
    folder = tmp_path / "tokenizer"
    arguments = ("--shards", str(tmp_path / "shard-*.tar"), "--out", str(folder), "--cache", str(tmp_path / "cache"))
    assert run_tool(*arguments, "--vocab_size", "500") == 0
    tokenizer = load_tokenizer(folder)
    assert tokenizer.model == train_sentencepiece(scene_captions(50), 500)
    assert f"{tokenizer.vocab_size} pieces" in capsys.readouterr().out

    assert run_tool(*arguments) == 2  # the folder holds a tokenizer now
    assert "--out" in capsys.readouterr().err
    assert run_tool("--shards", str(tmp_path / "none-*.tar"), "--out", str(tmp_path / "other")) == 2
    assert "--shards" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_tool_writes_whole_whatever_the_terminal_can_show(tmp_path, encoding):
    write_shard(tmp_path / "shard-0.tar", [f"ein grünes Häuschen, {text} 😀" for text in scene_captions(20)])
    arguments = ["--shards", str(tmp_path / "shard-0.tar"), "--vocab_size", "300", "--cache", str(tmp_path / "cache")]
    command = [sys.executable, str(TOOL), *arguments, "--out", str(tmp_path / "made")]
    there = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=there, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"H\\xe4uschen" in done.stdout or "Häuschen".encode("latin-1") in done.stdout
    assert load_tokenizer(tmp_path / "made").vocab_size <= 300
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("failing", ["tokenizer.json", SentencePieceTokenizer.model_file])
def test_the_tool_leaves_nothing_where_the_disk_is_full(tmp_path, capsys, monkeypatch, failing):
    write_shard(tmp_path / "shard-0.tar", scene_captions(20))
    write = os.fsync

    def full(descriptor: int) -> None:
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for folder, kept in (("new", None), ("used", "notes.txt")):
        out = tmp_path / folder
        if kept:
            out.mkdir()
            (out / kept).touch()
        arguments = ["--shards", str(tmp_path / "shard-0.tar"), "--out", str(out), "--cache", str(tmp_path / "cache")]
        assert run_tool(*arguments, "--vocab_size", "300") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert [path.name for path in out.glob("*")] == ([kept] if kept else [])
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    assert run_tool(*arguments, "--vocab_size", "300") == 0
    assert load_tokenizer(out).vocab_size <= 300


def test_the_tool_refuses_a_file_and_a_place_that_cannot_be_written_before_the_work(tmp_path, capsys, monkeypatch):
    write_shard(tmp_path / "shard-0.tar", scene_captions(20))
    (tmp_path / "file").touch()
    arguments = ["--shards", str(tmp_path / "shard-0.tar"), "--cache", str(tmp_path / "cache")]
    assert run_tool(*arguments, "--out", str(tmp_path / "file")) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert run_tool(*arguments, "--out", str(tmp_path / "file" / "below")) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
