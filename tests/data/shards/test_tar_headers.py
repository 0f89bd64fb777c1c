"""Sound tar headers are read as tarfile reads them, hostile ones in bounded time and memory."""

from __future__ import annotations

import io
import tarfile
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modstruct.data.shards.tar_headers import LARGEST_HEADER_BYTES, CutOff, DamagedHeader, Member, next_member

FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE]


def members(content: bytes) -> list[Member]:
    file, found, start = io.BytesIO(content), [], 0
    while (member := next_member(file, start)) is not None:
        found.append(member)
        start = member.end
    return found


def extended(kind: bytes, content: bytes) -> bytes:
    """An extended header: a block that says how long the content is, and the content."""
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def plain(name: str = "a.png", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150),
            st.binary(max_size=700),
            st.sampled_from(KINDS),
        ),
        max_size=5,
    ),
    st.sampled_from(FORMS),
)
def test_sound_tars_are_read_as_tarfile_reads_them(wanted, form):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for name, data, kind in wanted:
            info = tarfile.TarInfo(name.strip("/") or "x")
            info.type, info.size = kind, len(data) if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
            if form == tarfile.USTAR_FORMAT and len(info.name.encode()) > 100:
                info.name = "short"
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(content.getvalue())) as tar:
        theirs = [(m.name, m.isreg(), m.offset, m.offset_data, m.size) for m in tar]
    ours = [(m.name, m.ordinary, m.header, m.data, m.size) for m in members(content.getvalue())]
    # tarfile takes the slash from the end of a folder's name, which is never a sample's.
    assert [(name.rstrip("/"), *rest) for name, *rest in ours] == [(name.rstrip("/"), *rest) for name, *rest in theirs]


def test_a_pax_path_and_size_replace_the_headers_own():
    content = extended(b"x", b"19 path=other.name\n13 size=1000\n") + plain() + bytes(1024) + plain("b") + bytes(1024)
    first, second = members(content)
    assert (first.name, first.size, first.ordinary) == ("other.name", 1000, True)
    assert (second.name, second.header) == ("b", first.end)


@pytest.mark.parametrize("name", [b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.name"])
def test_a_sparse_file_is_no_ordinary_one_in_any_of_its_forms(name):
    record = b" %s=1\n" % name
    length = len(record) + 2
    (member,) = members(extended(b"x", b"%d%s" % (length, record)) + plain() + bytes(1024))
    assert not member.ordinary


@pytest.mark.parametrize(
    "records",
    [
        b"0 path=x\n",
        b"-9 path=x\n",
        b"99 path=x\n",
        b"9 path=x",
        b"9 path:x\n",
        b"path=x\n",
        b"+9 path=x\n",
        b"9" * 600,
        b"11 size=-1\n",
        b"11 size=1e\n",
        b"35 size=9999999999999999999999999\n",
    ],
)
def test_damaged_pax_records_are_refused(records):
    with pytest.raises(DamagedHeader):
        members(extended(b"x", records) + plain() + bytes(1024))


@pytest.mark.parametrize(
    "content",
    [
        extended(b"x", b"1" * (LARGEST_HEADER_BYTES - 2048)),  # a quadratic search in tarfile: CVE-2024-6232
        extended(b"x", b"1 hdrcharset" * 80_000),
        extended(b"L", b"a" * (LARGEST_HEADER_BYTES - 2048)) + plain(),
        extended(b"L", b"a") * 5000,
        extended(b"x", b"6 a=b\n" * 170_000) + plain() + bytes(1024),
        plain(size=0o77777777777) + b"x" * 512,
    ],
)
def test_a_hostile_header_costs_no_more_than_it_is_long(content):
    start = time.process_time()
    with suppress(CutOff, DamagedHeader):
        members(content)
    assert time.process_time() - start < 2


def test_a_header_of_gigabytes_is_refused_without_reading_it():
    class Untouchable(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            assert 0 <= size <= LARGEST_HEADER_BYTES
            return super().read(size)

    for kind in (b"x", b"g", b"L", b"K", b"X"):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**40
        with pytest.raises(DamagedHeader, match="too long"):
            next_member(Untouchable(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), 0)
