"""The page of tools/inspect_shards.py: what shards hold, with sample pairs to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modstruct.config import DataConfig
from modstruct.data.faults import BadSample
from modstruct.data.shards.inspection import PERCENTILES, REPEATED, Inspection
from modstruct.data.shards.reader import ShardReader
from modstruct.data.transforms.decoding import decode_image
from modstruct.errors import without_credentials
from modstruct.reporting.loading import data_uri
from modstruct.reporting.report import rendered


def shard_page(
    shards: Sequence[str],
    summary: Sequence[str],
    findings: Sequence[str],
    found: Inspection,
    reader: ShardReader,
    config: DataConfig,
    shown: Sequence[int],
) -> str:
    """shards: the patterns. summary, findings: texts. shown: numbers of the samples that are shown."""

    def entry(sample: int) -> dict[str, Any]:
        place = without_credentials(reader.samples.place(sample))
        try:
            raw = reader.read(sample)
            image = decode_image(raw.image, config.max_image_pixels, raw.where)
        except BadSample as bad:
            return {"place": f"{place}: {bad.cause}", "image": None, "captions": [""]}
        return {"place": f"{place}, {raw.key}", "image": data_uri(image), "captions": raw.captions}

    duplicates = {
        kind: {
            "repeated": repeated,
            "groups": [{"count": n, "entries": [entry(s) for s in some]} for n, some in repeated.largest],
        }
        for kind, repeated in found.repeated.items()
    }
    return rendered(
        "page.shards.html",
        shards=shards,
        summary=summary,
        findings=findings,
        percentiles=PERCENTILES,
        distributions={name: found.percentiles(name) for name in found.numbers},
        duplicates=duplicates,
        words=REPEATED,
        samples=[entry(sample) for sample in shown],
    )
