#!/usr/bin/env python
"""Pack images and captions into tar shards in img2dataset's layout: KEY.jpg (png, webp), KEY.txt, KEY.json.

From a folder, searched with its subfolders, in which NAME.jpg goes with NAME.txt (and NAME.json, if there is one):

    python tools/make_shards.py images/ --output shards/

From a table (CSV, or TSV by its ending; UTF-8) with a column of image files, relative to the table's folder, and one of
captions; every other column goes into KEY.json:

    python tools/make_shards.py captions.tsv --image_column file --caption_column title --output shards/

Images of other kinds that Pillow reads (GIF, AVIF, BMP, TIFF, …) are stored as PNG, of an animation its first frame.
What no run could use, and every file that is passed over, is counted and named. The shards are read with --data.train
'shards/*.tar'; shards/manifest.json has their samples, bytes and SHA-256, and what was left out, by cause.

All cores work (--workers), and the shards are the same whatever their number. The same command resumes a packing that
was interrupted.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.data.shards.members import Tally
from modstruct.data.shards.packing import EXTENSIONS, MANIFEST, Entry, image_endings, pack_shards, write_manifest
from modstruct.data.shards.pool import cores
from modstruct.distributed.run_lock import held
from modstruct.errors import RunError, printable, require
from modstruct.files import parse_json, require_writable

NAMED = 10  # bad samples, while packing


def pack() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder, or CSV or TSV table with a header line")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards; made if missing")
    parser.add_argument("--samples_per_shard", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--image_column", default="image", help="of a table (default: %(default)s)")
    parser.add_argument("--caption_column", default="caption", help="of a table (default: %(default)s)")
    quotes = (
        'quotes are letters like others in a table; else a field that begins with " ends with one: "the ""last"" one"'
    )
    parser.add_argument("--plain_quotes", action="store_true", help=quotes)
    parser.add_argument(
        "--join_captions",
        action="store_true",
        help="rows of one image become one sample with several captions, for evaluation; the first is the caption",
    )
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core, %(default)s)")
    options = parser.parse_args()
    for option in ("samples_per_shard", "workers"):
        require(getattr(options, option) >= 1, f"--{option}", getattr(options, option), "at least 1")
    passed_over = Tally()

    def entries(tally: Tally) -> Iterator[Entry]:
        if options.input.is_dir():
            found = from_folder(options.input, tally)
        else:
            quoting = csv.QUOTE_NONE if options.plain_quotes else csv.QUOTE_MINIMAL
            found = from_table(options.input, options.image_column, options.caption_column, quoting)
        return joined(found, tally) if options.join_captions else found

    count = sum(1 for _ in entries(passed_over))  # what is wrong with the input is said before the packing
    if not count:
        say(passed_over, "passed over")
        raise ValueError(f"{options.input}: no image ({', '.join(EXTENSIONS)}) in it")
    require_writable("--output", options.output)
    with held(options.output, "--output"), stopping.stage("the same command resumes the packing"):
        return _pack(entries(Tally()), count, options, passed_over)


def _pack(entries: Iterator[Entry], count: int, options: argparse.Namespace, passed_over: Tally) -> int:
    reports, changed, left_out = [], Tally(), Tally()
    with tqdm(desc="packing", total=count, unit="sample") as bar:
        for report in pack_shards(entries, count, options.output, options.samples_per_shard, options.workers):
            before = left_out.counts.total()
            for tally, found in ((changed, report["changed"]), (left_out, report["left_out"])):
                tally.merge(**found)
            named = [f"{cause}: {where}" for cause, found in report["left_out"]["examples"].items() for where in found]
            for text in named[: max(0, NAMED - before)]:
                tqdm.write(printable(f"left out: {text}"), file=sys.stderr)
            bar.update(report["samples"] + sum(report["left_out"]["counts"].values()))
            reports.append(report)
    packed = sum(report["samples"] for report in reports)
    write_manifest(options.output, reports, passed_over)
    print(f"{packed} samples in {options.output}{f', described in {MANIFEST}' if packed else ''}")
    say(changed, "changed")
    say(left_out, "left out")
    say(passed_over, "passed over")
    return 0 if packed else 1


def say(tally: Tally, what: str) -> None:
    for cause, count in tally.counts.most_common():
        examples = f"{', '.join(tally.examples[cause])}{', …' if count > 3 else ''}"
        print(printable(f"{count} {what}: {cause} ({examples})"))


def from_folder(folder: Path, passed_over: Tally) -> Iterator[Entry]:
    """Each image in the folder, in order of path, with the caption and metadata of its name."""
    known = image_endings()
    images, texts, about = [], {}, {}
    for path in sorted(_files(folder, passed_over)):
        ending, name = path.suffix.lower(), path.with_suffix("")
        if _is_hidden(path, folder):
            passed_over.add("hidden files", str(path))
        elif ending in known and path.is_file():
            images.append(path)
        elif ending == ".txt" and path.is_file():
            texts[name] = path  # of a.TXT and a.txt the latter, which is sorted behind
        elif ending == ".json" and path.is_file():
            about[name] = path
        else:
            passed_over.add(f"files {ending}" if ending else "files without an ending", str(path))
    for path in images:
        name = path.with_suffix("")
        caption = texts[name].read_text("utf-8-sig", errors="surrogateescape") if name in texts else None
        yield path, caption, _metadata(about[name]) if name in about else {}
    names = {path.with_suffix("") for path in images}
    for name, path in (texts | about).items():
        if name not in names:
            passed_over.add(f"files {path.suffix.lower()} without an image", str(path))


def _files(folder: Path, passed_over: Tally) -> Iterator[Path]:
    """Of the folder and its subfolders, links to others among them, unless they are hidden; each folder once, or a link
    could lead round."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if _is_hidden(Path(place), folder):
            folders[:] = [name for name in folders if not os.path.islink(os.path.join(place, name))]
        elif (real := os.path.realpath(place)) in seen:
            passed_over.add("folders that are searched already, through a link", place)
            folders.clear()
            continue
        else:
            seen.add(real)
        yield from (Path(place, file) for file in files)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _metadata(path: Path) -> dict:
    try:
        metadata = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must hold a JSON object, {{...}}: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: must hold a JSON object, {{...}}, not a {type(metadata).__name__}")
    return metadata


def from_table(table: Path, image_column: str, caption_column: str, quoting: int) -> Iterator[Entry]:
    """(image, caption, other columns) of each row. quoting: of the csv module."""
    if table.suffix.lower() in (".json", ".jsonl"):
        other = "this is JSON (COCO's captions file keeps images and captions apart, and ALBEF's lists have several)"
        raise ValueError(f"{table}: {other}: give a CSV or TSV table with a column of image files and one of captions")
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        if header.startswith("sep="):
            raise ValueError(f"{table}: the line {header.strip()!r} is a spreadsheet's own: delete it")
        if "\udcff\udcfe" in header or "\udcfe\udcff" in header:
            raise ValueError(f"{table}: UTF-16, as it seems: save it as UTF-8")
        file.seek(0)
        # Where a comma is the decimal sign, spreadsheets write semicolons between the columns.
        of_csv = ";" if ";" in header and "," not in header else ","
        delimiter = "\t" if table.suffix.lower() in (".tsv", ".tab") else of_csv
        # strict, or a quote that nothing closes would take all rows up to the next one into its field.
        rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
        begun = 1
        try:
            columns = rows.fieldnames or ()
            for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
                if column not in columns:
                    raise ValueError(f"{option} = {column!r}: the columns of {table} are {', '.join(columns)}")
            twice = next((column for column in columns if columns.count(column) > 1), None)
            if twice is not None:
                one = "and only one of them would count: rename one"
                raise ValueError(f"{table}: two columns are called {twice!r}, {one}")
            begun = rows.line_num + 1
            for row in rows:
                metadata = {name: value for name, value in row.items() if name not in (image_column, caption_column)}
                yield table.parent / (row[image_column] or ""), row[caption_column], metadata
                begun = rows.line_num + 1
        except csv.Error as error:
            close = (
                'close its quotes, as in "the ""last"" one", or give --plain_quotes, if they are letters like others'
            )
            remedy = "shorten it" if "field limit" in str(error) else close
            raise ValueError(f"{table}: the row that begins in line {begun}: {error}; {remedy}") from None


def joined(found: Iterator[Entry], passed_over: Tally) -> Iterator[Entry]:
    """One entry an image, with all its captions under "captions" in the metadata of its first row."""
    captions: dict[Path, list[str]] = {}
    first: dict[Path, dict] = {}
    for image, caption, metadata in found:
        if image in first and not (caption and caption.strip()):
            passed_over.add("rows without a caption", str(image))
        captions.setdefault(image, []).extend([caption] if caption and caption.strip() else [])
        first.setdefault(image, metadata)
    for image, texts in captions.items():
        yield image, texts[0] if texts else None, first[image] | {"captions": texts}


if __name__ == "__main__":
    stopping.listen()
    sys.exit(run_tool(pack, (OSError, ValueError, RunError)))
