#!/usr/bin/env python
"""Pack images and captions into tar shards in img2dataset's layout: KEY.jpg (png, webp), KEY.txt, KEY.json.

From a folder, searched with its subfolders, in which NAME.jpg goes with NAME.txt (and NAME.json, if there is one):

    python tools/make_shards.py images/ --output shards/

From a table (CSV, or TSV by its ending) with a column of image files, relative to the table's folder, and one of
captions; every other column goes into KEY.json:

    python tools/make_shards.py captions.tsv --image_column file --caption_column title --output shards/

Images of other kinds that Pillow reads (GIF, AVIF, BMP, TIFF, …) are stored as PNG, of an animation its first frame.
What no run could use, and every file that is passed over, is counted and named. The shards are read with --data.train
'shards/*.tar'.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.config import DataConfig
from modstruct.data.faults import BadSample
from modstruct.data.shards.members import Tally
from modstruct.data.shards.writer import AtomicShardWriter
from modstruct.data.transforms.decoding import FORMATS, decode_image
from modstruct.distributed.run_lock import held
from modstruct.errors import printable
from modstruct.files import parse_json, require_writable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
# Of others than FORMATS, those that Pillow reads by itself: no EPS, which runs Ghostscript, and no films.
CONVERTED = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF")
Entry = tuple[Path, str | None, dict]
"""Image, caption or None, metadata."""
NAMED = 10  # bad samples, while packing
EXTRA_CELLS = None  # csv's key of the cells beyond the header


def pack() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder, or CSV or TSV table with a header line")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards; made if missing")
    parser.add_argument("--samples_per_shard", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--image_column", default="image", help="of a table (default: %(default)s)")
    parser.add_argument("--caption_column", default="caption", help="of a table (default: %(default)s)")
    parser.add_argument(
        "--join_captions",
        action="store_true",
        help="rows of one image become one sample with several captions, for evaluation; the first is the caption",
    )
    options = parser.parse_args()
    if options.samples_per_shard < 1:
        parser.error(f"--samples_per_shard = {options.samples_per_shard}: at least 1")
    passed_over = Tally()
    try:
        if options.input.is_dir():
            found = list(from_folder(options.input, passed_over))
        else:
            found = list(from_table(options.input, options.image_column, options.caption_column))
    except (OSError, ValueError, csv.Error) as error:
        parser.error(str(error))
    if not found:
        say(passed_over, "passed over")
        parser.error(f"{options.input}: no image ({', '.join(EXTENSIONS)}) in it")
    if options.join_captions:
        found = joined(found, passed_over)
    try:
        require_writable("--output", options.output)
    except ValueError as error:
        parser.error(str(error))
    if any(options.output.glob("*.tar")):
        parser.error(f"--output = {options.output}: holds shards already; choose another folder")

    left_out, changed = Tally(), Tally()
    with ExitStack() as stack:
        try:
            stack.enter_context(held(options.output, "--output"))
        except ValueError as error:
            parser.error(str(error))
        shards = stack.enter_context(AtomicShardWriter(options.output, options.samples_per_shard, changed))
        for image, caption, metadata in tqdm(found, "packing", unit="sample"):
            try:
                shards.write(*checked(image, caption, metadata, changed))
            except BadSample as error:
                left_out.add(error.cause, error.where)
                if left_out.counts.total() <= NAMED:
                    tqdm.write(printable(f"left out: {error}"), file=sys.stderr)
    packed = len(found) - left_out.counts.total()
    print(f"{packed} samples in {options.output}")
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
    known = {
        *EXTENSIONS,
        *(end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, *CONVERTED)),
    }
    images, texts, about = [], {}, {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        ending, name = path.suffix.lower(), path.with_suffix("")
        if path.name.startswith("."):
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


def _metadata(path: Path) -> dict:
    try:
        metadata = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must hold a JSON object, {{...}}: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: must hold a JSON object, {{...}}, not a {type(metadata).__name__}")
    return metadata


def from_table(table: Path, image_column: str, caption_column: str) -> Iterator[Entry]:
    """(image, caption, other columns) of each row."""
    if table.suffix.lower() in (".json", ".jsonl"):
        other = "this is JSON (COCO's captions file keeps images and captions apart, and ALBEF's lists have several)"
        raise ValueError(f"{table}: {other}: give a CSV or TSV table with a column of image files and one of captions")
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if table.suffix.lower() in (".tsv", ".tab") else ",")
        columns = rows.fieldnames or ()
        for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
            if column not in columns:
                raise ValueError(f"{option} = {column!r}: the columns of {table} are {', '.join(columns)}")
        twice = next((column for column in columns if columns.count(column) > 1), None)
        if twice is not None:
            raise ValueError(f"{table}: two columns are called {twice!r}, and only one of them would count: rename one")
        for row in rows:
            metadata = {name: value for name, value in row.items() if name not in (image_column, caption_column)}
            yield table.parent / (row[image_column] or ""), row[caption_column], metadata


def joined(found: list[Entry], passed_over: Tally) -> list[Entry]:
    """One entry an image, with all its captions under "captions" in the metadata of its first row."""
    captions: dict[Path, list[str]] = {}
    first: dict[Path, dict] = {}
    for image, caption, metadata in found:
        if image in first and not (caption and caption.strip()):
            passed_over.add("rows without a caption", str(image))
        captions.setdefault(image, []).extend([caption] if caption and caption.strip() else [])
        first.setdefault(image, metadata)
    return [
        (image, texts[0] if texts else None, first[image] | {"captions": texts}) for image, texts in captions.items()
    ]


def checked(image: Path, caption: str | None, metadata: dict, changed: Tally) -> tuple[str, bytes, bytes, dict]:
    """Extension, image, caption and metadata, all of which a run can read. Raises BadSample."""
    where = str(image)
    if EXTRA_CELLS in metadata:
        raise BadSample("a row of more cells than columns: put a caption that holds the separator in quotes", where)
    if caption is None:
        raise BadSample("no caption", where)
    try:
        text = caption.strip().encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8
        raise BadSample("undecodable text", where) from None
    if not text:
        raise BadSample("empty caption", where)
    try:
        content = image.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", f"{where}: {error.strerror}") from None
    content, extension = _as_read_by_runs(content, image, changed)
    own = {"file": where, "caption": text.decode()}
    for name, value in own.items():
        if metadata.get(name, value) != value:
            changed.add(f"metadata field `{name}` replaced", where)
    return extension, content, text, metadata | own


def _as_read_by_runs(content: bytes, image: Path, changed: Tally) -> tuple[bytes, str]:
    """The image as it is, or as PNG where runs do not read its kind, and its extension. Raises BadSample."""
    most, where, ending = DataConfig().max_image_pixels, str(image), image.suffix.lower()
    try:
        decode_image(content, most, where)
        return content, (ending if ending in EXTENSIONS else ".jpg").lstrip(".")
    except BadSample as error:
        if error.cause != "undecodable image":
            raise
    decoded, made = decode_image(content, most, where, CONVERTED), io.BytesIO()
    decoded.save(made, "PNG")
    changed.add(f"{ending} stored as PNG", where)
    return made.getvalue(), "png"


if __name__ == "__main__":
    stopping.listen()
    sys.exit(run_tool(pack))
