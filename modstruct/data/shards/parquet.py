"""img2dataset's parquet beside shards, 00000.parquet beside 00000.tar: which samples a filter keeps.

A row is a pair that was to be downloaded; those of status `success` lie in the tar, under `key`. A filter compares
columns with numbers and texts: `similarity > 0.3 and not (width < 128 or status in ["x", "y"])`. It is written in
Python's grammar, but never run by Python: what is allowed of it becomes an expression of pyarrow.compute.
"""

from __future__ import annotations

import ast
import io
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from modstruct.data.shards.index import OBJECT_BUFFER_BYTES, ShardIndex, UnreadableShard, key_hashes, parquet_name
from modstruct.data.shards.objects import ObjectFile, is_object
from modstruct.errors import refuse

KEY, STATUS, SUCCESS = "key", "status", "success"
LONGEST = 10_000  # characters of a filter
COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
GRAMMAR = (
    'give comparisons of columns with numbers and texts, joined by and, or, not: similarity > 0.3 and license in ["by"]'
)


@dataclass
class Effect:
    """Of a filter on a source."""

    samples: int = 0
    """In the tars."""
    kept: int = 0
    without_value: int = 0
    """Left out, since a column that decides has no value."""
    without_row: int = 0
    """Left out, since the parquet does not have them."""
    without_sample: int = 0
    """Rows of status `success` that the tars do not have."""

    def add(self, other: Effect) -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def __str__(self) -> str:
        share = f"{self.kept / max(1, self.samples):.1%}"
        more = {
            "left out for want of a value": self.without_value,
            "left out for want of a row": self.without_row,
            "rows without a sample": self.without_sample,
        }
        told = "".join(f"; {count:,} {what}" for what, count in more.items() if count)
        return f"{self.kept:,} of {self.samples:,} samples are kept ({share}{told})"


def filtered(job: tuple[str, str, Path]) -> tuple[np.ndarray, Effect]:
    """job: a filter, a shard, and its index, which has keys. Returns which of its samples are kept, (n,) bool.

    Raises ValueError naming data.filter, and UnreadableShard for a parquet that cannot be read.
    """
    text, shard, file = job
    index = ShardIndex.load(file)
    if index is None or index.keys is None:
        raise UnreadableShard(shard, f"its index {file} cannot be read back")
    keys = index.keys
    expression, columns = parsed(text)
    import pyarrow as pa
    from pyarrow.dataset import InMemoryDataset

    with _opened(shard) as parquet:
        there = parquet.schema_arrow.names
        if lacking := [name for name in (KEY, *columns) if name not in there]:
            has = f"{parquet_name(shard)} has no column {', '.join(lacking)}; its columns are {', '.join(there)}"
            refuse("data.filter", text, f"{has}: correct the name")
        table = parquet.read(columns=[*{KEY: 0, **dict.fromkeys(columns)}, *([STATUS] if STATUS in there else [])])
    if STATUS in table.column_names:
        table = table.filter(pa.compute.field(STATUS) == SUCCESS)
    for number, column in enumerate(table.columns):
        if pa.types.is_floating(column.type):  # NaN is no value
            none = pa.scalar(None, column.type)
            known = pa.compute.if_else(pa.compute.is_nan(column), none, column)
            table = table.set_column(number, table.column_names[number], known)
    try:
        keep = InMemoryDataset(table).to_table(columns={"keep": expression})["keep"]
        if not pa.types.is_boolean(keep.type):
            refuse("data.filter", text, f"is of type {keep.type}, no condition: {GRAMMAR}")
    except (pa.ArrowException, TypeError) as error:  # as of a text that is compared with a number
        kinds = ", ".join(f"{name}: {table.schema.field(name).type}" for name in columns)
        refuse("data.filter", text, f"cannot be computed of these columns ({kinds}): {' '.join(str(error).split())}")
    hashes = key_hashes([str(key) for key in table[KEY].to_pylist()])
    order = np.argsort(hashes, kind="stable")
    places = np.minimum(hashes[order].searchsorted(keys), max(len(order) - 1, 0))
    rows = order[places] if len(order) else np.zeros(len(keys), dtype=np.int64)
    found = hashes[rows] == keys if len(order) else np.zeros(len(keys), dtype=bool)
    chosen = pa.compute.fill_null(keep, False).to_numpy()
    empty = keep.is_null().to_numpy()
    kept = found & (chosen[rows] if len(order) else False)
    without_value = int((found & empty[rows]).sum()) if len(order) else 0
    without_sample = int((~np.isin(hashes, keys)).sum())
    return kept, Effect(len(keys), int(kept.sum()), without_value, int((~found).sum()), without_sample)


def statuses(shard: str) -> Counter[str]:
    """Rows of a shard's parquet by status."""
    try:
        with _opened(shard) as parquet:
            if STATUS not in parquet.schema_arrow.names:
                return Counter({SUCCESS: parquet.metadata.num_rows})
            return Counter(map(str, parquet.read(columns=[STATUS])[STATUS].to_pylist()))
    except UnreadableShard:
        return Counter({"(a parquet that cannot be read)": 1})


@contextmanager
def _opened(shard: str) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    name = parquet_name(shard)
    try:
        raw = ObjectFile(name) if is_object(name) else io.FileIO(name)
        with io.BufferedReader(raw, OBJECT_BUFFER_BYTES) as file:
            yield ParquetFile(file)
    except (OSError, pa.ArrowException) as error:  # pyarrow's own of a damaged file are OSErrors, too
        raise UnreadableShard(name, " ".join(str(error).split())) from None


def parsed(text: str) -> tuple[Any, list[str]]:
    """A filter as an expression of pyarrow, and the columns in it. Raises ValueError naming data.filter."""
    try:
        import pyarrow as pa
        from pyarrow import compute
    except ImportError:
        refuse("data.filter", text, "needs a package that is missing: pip install 'modstruct[parquet]', or null")
    columns: dict[str, None] = {}

    def wrong(node: ast.AST) -> NoReturn:
        part = ast.get_source_segment(text, node) or text  # type: ignore[arg-type]
        refuse("data.filter", text, f"{part!r} is not understood: {GRAMMAR}")

    def column(name: str) -> Any:
        columns[name] = None
        return compute.field(name)

    def constant(node: ast.AST) -> Any:
        negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner = node.operand if isinstance(node, ast.UnaryOp) and negated else node
        value = inner.value if isinstance(inner, ast.Constant) else None
        if negated and isinstance(value, int | float) and not isinstance(value, bool):
            return -value
        if negated or not isinstance(value, int | float | str):
            wrong(node)
        return value

    def operand(node: ast.AST) -> Any:
        return column(node.id) if isinstance(node, ast.Name) else compute.scalar(constant(node))

    def comparison(left: ast.AST, kind: ast.cmpop, right: ast.AST) -> Any:
        if isinstance(kind, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple):
                wrong(right)
            value = operand(left)
            among = value.isin([constant(item) for item in right.elts])
            # isin is False of no value, where comparisons have none.
            there = compute.if_else(value.is_valid(), among, pa.scalar(None, pa.bool_()))
            return there if isinstance(kind, ast.In) else ~there
        if type(kind) not in COMPARISONS:
            wrong(left)
        return COMPARISONS[type(kind)](operand(left), operand(right))

    def condition(node: ast.AST) -> Any:
        if isinstance(node, ast.BoolOp):
            joined = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(joined, map(condition, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~condition(node.operand)
        if isinstance(node, ast.Compare):
            sides: Sequence[ast.AST] = [node.left, *node.comparators]
            return reduce(operator.and_, map(comparison, sides, node.ops, sides[1:]))
        if isinstance(node, ast.Name):
            return column(node.id)
        wrong(node)

    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST:,} characters")
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        refuse("data.filter", text, f"is no expression ({getattr(error, 'msg', error)}): {GRAMMAR}")
    try:
        return condition(tree), [*columns]
    except RecursionError:
        refuse("data.filter", text, f"is nested too deeply: {GRAMMAR}")
    except OverflowError:
        refuse("data.filter", text, "has a whole number beyond 64 bits: write it with a point, as 1e23")
    except (pa.ArrowException, UnicodeError) as error:  # as of a list of numbers and texts
        refuse("data.filter", text, f"has values that are no column's ({' '.join(str(error).split())}): {GRAMMAR}")
