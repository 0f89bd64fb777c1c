"""From a checkpoint to its report in one command: embed, measure, report.

deepspeed launch_scripts/evaluate.py full --checkpoint runs/scenes --out evaluations/scenes
deepspeed launch_scripts/evaluate.py full --checkpoint runs/emoji --out evaluations/emoji --sets eval

Takes all options of `evaluate.py embed`; the training splits of labelled sets are embedded too (--all_splits false
leaves them out, and the probes). An interrupted command is resumed. For metrics with other settings run
`evaluate.py measure` on the same folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modstruct.cli import parse, recipe_parser, run
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.commands.embed import add_options, embed
from modstruct.stopping import stage

USAGE = "deepspeed [launcher options] launch_scripts/evaluate.py full --checkpoint FOLDER --out FOLDER [--sets SET …]"
EVERYTHING = {"all_splits": True, "embedding.arrays": ["all"]}


def main(words: Sequence[str]) -> None:
    parser = recipe_parser(__doc__, USAGE)
    add_options(parser)
    parser.set_defaults(EVERYTHING)
    recipe, options = parse(parser, words, prepare=checkpoint_arguments)

    def all_of_it() -> None:
        from modstruct.commands.measure import METRICS, MeasureConfig, measure, require_all
        from modstruct.distributed import start_processes
        from modstruct.distributed.collect import on_main
        from modstruct.distributed.run_lock import held
        from modstruct.reporting.report import write_report

        start_processes()
        out = Path(options.out).expanduser()
        with held(out, "--out"), stage("what was embedded and measured is kept; the same command does the rest"):
            embed(recipe, options, ["evaluate.py", "full", *words])
            problems = measure(out, MeasureConfig(), [*METRICS], [str(out)])
            on_main(lambda: print(write_report([out], out / "report")))
            require_all(problems)

    run(all_of_it)
