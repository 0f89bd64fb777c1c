"""Every option that takes a list takes it as words and in brackets."""

from __future__ import annotations

import argparse

import pytest

from modstruct import cli
from modstruct.cli import FINETUNE_RECIPES
from modstruct.commands import embed
from modstruct.commands.measure import METRICS, MeasureConfig
from modstruct.config import FinetuneRecipe
from modstruct.list_options import list_words


def lists_of(parser) -> list[str]:
    """The options whose value is a list."""
    found = [(action.option_strings, str(getattr(action, "_typehint", ""))) for action in parser._actions]
    kinds = {options[0]: kind for options, kind in found if options and not options[0].endswith(".help")}
    return [option for option, kind in kinds.items() if "list[" in kind or "tuple[" in kind]


PARSERS = {
    "pretrain": lambda: cli.recipe_parser("", ""),
    "finetune": lambda: cli.recipe_parser("", "", FinetuneRecipe, FINETUNE_RECIPES),
    "measure": lambda: cli.config_parser("", "", MeasureConfig),
}


@pytest.mark.parametrize("kind", PARSERS)
def test_a_list_of_words_means_the_list_in_brackets(kind):
    parser = PARSERS[kind]()
    options = lists_of(parser)
    assert options
    for option in options:
        words = ["0.01", "0.8", "0.9"][: 3 if option.endswith((".mean", ".std")) else 2]
        if not option.endswith((".mean", ".std", "betas", "_scale", "_range")):
            words = ["a", "{0..3}, b"] if option.endswith(("train", "labels", "arrays")) else ["3", "7"]
        quoted = ", ".join(f"'{word}'" if "{" in word else word for word in words)
        assert cli.parse(parser, [option, *words])[0] == cli.parse(parser, [option, f"[{quoted}]"])[0], option


def test_one_word_is_a_list_of_one_where_it_is_no_value_by_itself():
    parser = PARSERS["pretrain"]()
    embed.add_options(parser)

    def parse(*words):
        return cli.parse(parser, ["--out", "x", *words])

    assert parse("--embedding.arrays", "all")[1].embedding.arrays == ["all"]
    assert parse("--evaluation.recall_at", "7")[0].evaluation.recall_at == [7]
    assert parse("--data.train", "a.tar")[0].data.train == "a.tar"
    assert [source.weight for source in parse("--data.train", "[{shards: a, weight: 2}]")[0].data.train] == [2]
    for written in (["a", "b=c"], ["[a, b=c]"]):
        assert parse("--sets", *written)[1].sets == ["a", "b=c"]


def test_numbers_end_where_an_argument_of_another_kind_begins():
    parser = PARSERS["measure"]()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--metrics", nargs="+", choices=METRICS)
    config, options = cli.parse(
        parser, ["--zero_shot.top_k", "1", "5", "evaluations/x", "--metrics", "[retrieval, structure]"]
    )
    assert (config.zero_shot.top_k, options.folders, options.metrics) == (
        (1, 5),
        ["evaluations/x"],
        ["retrieval", "structure"],
    )
    assert cli.parse(parser, ["--zero_shot.top_k", "[1, 5]", "evaluations/x"])[1].folders == ["evaluations/x"]


def test_words_of_a_plain_parser_may_be_in_brackets(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", nargs="+")
    assert list_words(parser, ["--shards", "['a/*.tar', 010]", "b"]) == ["--shards", "a/*.tar", "010", "b"]
    for pattern in ("[ab]*.tar", "[ab]*.[tar]"):
        assert list_words(parser, ["--shards", pattern]) == ["--shards", pattern]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[ab]").touch()
    assert list_words(parser, ["--shards", "[ab]"]) == ["--shards", "[ab]"]


def test_a_repeated_key_on_the_command_line_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.parse(PARSERS["pretrain"](), ["--data.train", "[{shards: a.tar, weight: 1, shards: b.tar}]"])
    assert "error: --data.train: line 1: the key 'shards' is there already" in capsys.readouterr().err
    assert cli.parse(PARSERS["pretrain"](), ["--data.train", "{a,a}.tar"])[0].data.train == "{a,a}.tar"
