"""The headers of a tar, read with bounds: for each member its name, its kind and where its bytes lie.

Not tarfile: on hostile headers it recurses, takes seconds to hours in its regular expressions (CVE-2024-6232), loops
(CVE-2025-8194) and reads extended headers of any size, differently in each release of Python. Here the cost of a header
is linear in its length. Supported are ustar, GNU long names and pax paths and sizes: what shards are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
# All extended headers before a member (long names, pax records, with room for extended attributes).
LARGEST_HEADER_BYTES = 1 << 20
LONGEST_NAME_BYTES = 4096  # Linux opens no longer path

ORDINARY = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: their size field is meaningless
LONG_NAME, LONG_LINK, SPARSE = b"L", b"K", b"S"
PAX, GLOBAL_PAX = (b"x", b"X"), b"g"


class DamagedHeader(ValueError):
    """No tar header, or an impossible one."""


class CutOff(ValueError):
    """The file ends before the end mark."""


@dataclass
class Member:
    """One member of a tar."""

    name: str
    """As written: never to be used as a path."""
    ordinary: bool
    """A plain file; neither link, folder, device nor sparse file."""
    header: int
    """Where its headers begin, in bytes from the start of the file."""
    data: int
    """Where its content begins."""
    size: int
    """Bytes of its content."""
    end: int
    """Where the next member's headers begin."""


def next_member(file: BinaryIO, start: int) -> Member | None:
    """The member whose headers begin at byte `start`; None at the end mark. Reads headers only, never content.

    Raises CutOff or DamagedHeader.
    """
    position = start
    long_name: bytes | None = None
    records: dict[bytes, bytes] = {}
    while True:
        block = _read(file, position, BLOCK_BYTES)
        if position == start and not block.strip(b"\0"):
            return None
        kind, size = _check(block)
        position += BLOCK_BYTES
        if kind not in (LONG_NAME, LONG_LINK, GLOBAL_PAX, *PAX):
            break
        if size > LARGEST_HEADER_BYTES or position + size - start > LARGEST_HEADER_BYTES:
            raise DamagedHeader("extended header too long")
        if kind == LONG_NAME:
            long_name = _read(file, position, size).split(b"\0", 1)[0]
        elif kind in PAX:
            records |= _pax_records(_read(file, position, size))
        position += _padded(size)  # names and sizes in a global pax header cannot be trusted
    name = records.get(b"path", long_name if long_name is not None else _short_name(block))
    if len(name) > LONGEST_NAME_BYTES:
        raise DamagedHeader("name too long")
    sparse = kind == SPARSE or any(key.startswith(b"GNU.sparse.") for key in records)
    if kind == SPARSE:
        position = _after_sparse_map(file, start, position, block)
    if b"size" in records:
        size = _decimal(records[b"size"])
    if kind in WITHOUT_DATA:
        size = 0
    folder = kind == b"\0" and name.endswith(b"/")  # as pre-POSIX tars write it
    ordinary = kind in ORDINARY and not sparse and not folder
    text = name.decode("utf-8", "surrogateescape")
    return Member(text, ordinary, start, position, size, position + _padded(size))


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    content = file.read(size)
    if len(content) < size:
        raise CutOff
    return content


def _check(block: bytes) -> tuple[bytes, int]:
    """Kind and size of a header block whose checksum is right."""
    written = _number(block[148:156])
    # The checksum counts its own field as spaces. Some old tars sum signed bytes.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if written != total and written != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise DamagedHeader("wrong checksum")
    return block[156:157], _number(block[124:136])


def _number(field: bytes) -> int:
    """A number of 0 or more: octal digits, or base 256 after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not all(byte in b"01234567" for byte in digits):  # int() itself would take a sign and underscores
        raise DamagedHeader("no number where one belongs")
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise DamagedHeader("no number where one belongs")
    return int(digits)


def _short_name(block: bytes) -> bytes:
    name, prefix = (field.split(b"\0", 1)[0] for field in (block[:100], block[345:500]))
    # GNU's own format keeps times where POSIX keeps the folder.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n"; LENGTH counts the whole record."""
    records = {}
    start = 0
    while start < len(content) and content[start] != 0:
        digits, space, _ = content[start : start + 21].partition(b" ")
        end = start + _decimal(digits)
        key, equals, value = content[start + len(digits) + 1 : end].partition(b"=")
        if not space or not equals or end > len(content) or value[-1:] != b"\n":
            raise DamagedHeader("damaged pax record")
        records[key] = value[:-1]
        start = end
    return records


def _after_sparse_map(file: BinaryIO, start: int, position: int, block: bytes) -> int:
    more = block[482]
    while more:
        if position - start > LARGEST_HEADER_BYTES:
            raise DamagedHeader("extended header too long")
        more = _read(file, position, BLOCK_BYTES)[504]
        position += BLOCK_BYTES
    return position


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
