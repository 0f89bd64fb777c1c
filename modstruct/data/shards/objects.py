"""Shards in object stores and on web servers (s3://, gs://, https://, what else fsspec knows), read by range.

What may pass (no answer, a slow one, a cut connection, 5xx) is asked for again, what will not (403, 404) is not. Every
answer says of which version of the object it is. fsspec gives each process, a forked one too, file systems, connections
and an event loop of its own; so nothing of them is kept here.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from glob import has_magic
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from modstruct.errors import RunError, refuse, require, without_credentials

Result = TypeVar("Result")
log = logging.getLogger(__name__)

AT_ONCE, WAITING = 32, 1024  # requests
REQUEST_SECONDS = 60.0
# Of what fails for a while; less than train.hang_timeout_minutes.
PATIENCE_SECONDS = 300.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
NAMED_SECONDS, SAID_AFTER = 10.0, 5
"""Longest that a store may fail without a warning; failed requests after which a word is said of it."""

CHANGED = "shard changed since it was indexed"
EXTRAS = {"http": "https", "https": "https", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Extra of modstruct that a protocol needs."""
CREDENTIALS = {
    "https": "give the address with user:password@, or a signed one",
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run `gcloud auth application-default login`; for a public bucket set FSSPEC_GS_TOKEN=anon",
}
"""What is to be done, by extra, where access is denied."""
_SIGNATURE = r"(X-(Amz|Goog|Oss)-[\w-]*|(AWS|OSS)?AccessKeyId|GoogleAccessId|Key-Pair-Id|Signature|Policy|Expires)="
SIGNATURE = re.compile(_SIGNATURE, re.IGNORECASE)
"""Parameters by which S3, Google, CloudFront and Aliyun sign an address."""
AZURE_SIGNATURE = re.compile(r"(sig|sv|ss|srt|sp|spr|se|st|sr|si|sip|sdd|ske|sks|skt|skv|skoid|sktid)=")
"""Those of Azure, among which `sig` is; short names, which others may use for what they like."""
# Of aiohttp, botocore and google.auth: no subclasses of OSError, and none need be installed.
PASSING = {"ClientConnectionError", "ClientPayloadError"}
PASSING |= {"HTTPClientError", "ConnectionError", "IncompleteReadError", "MetadataRetrievalError", "TransportError"}
PASSING_STATUS = (408, 425, 429)
OUR_FAULTS = (TypeError, AttributeError, LookupError, NameError, AssertionError)
"""Errors of a program, which say nothing of the object."""
WHOLE_FILES = "the server sends whole files only: use pipe:, or copy the shards"


class Piece(NamedTuple):
    content: bytes
    size_bytes: int
    """Of the whole object."""
    version: int
    """Of the object, 0 to 2^62: another number for another ETag or generation, or, where it has none, date."""


class ObjectFailed(OSError):
    """An object cannot be read, and will not be if it is asked for again. cause: as BadSample has it."""

    def __init__(self, cause: str, reason: str):
        super().__init__(cause, reason)  # both in args, so that it travels between processes
        self.cause, self.reason = cause, reason

    def __str__(self) -> str:
        return self.reason


def is_object(shard: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", shard) is not None


def unsigned(url: str) -> str:
    """An address without user, password and the known parameters of a signature, which differ at each signing."""
    address, _, query = url.partition("?")
    given = query.split("&") if query else []
    azure = any(one.startswith("sig=") for one in given)
    kept = [one for one in given if not SIGNATURE.match(one) and not (azure and AZURE_SIGNATURE.match(one))]
    return "?".join([without_credentials(address), *(["&".join(kept)] if kept else [])])


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, one a process, and the path in it."""
    file_system = _file_system_of("/".join(url.split("/")[:3]), os.getpid())
    return file_system, file_system._strip_protocol(url)


@lru_cache(maxsize=64)  # fsspec's own takes a third of a millisecond
def _file_system_of(store: str, process: int) -> Any:
    from fsspec.core import url_to_fs  # here: most runs read local files

    return url_to_fs(store)[0]


def expand_object(pattern: str, names: Sequence[str], field: str) -> list[str]:
    """Addresses that names, of one pattern without braces, match. Raises ValueError naming the field."""
    require("::" not in pattern, field, pattern, "chained protocols are not read; give the address of the shard itself")
    require(all(map(is_object, names)), field, pattern, "addresses and paths in one pattern; make two sources of it")
    scheme, found = _scheme(pattern), list[str]()
    web = EXTRAS.get(scheme) == "https"  # where ? begins a query
    wild = web and any("*" in urlsplit(name).path for name in names)
    require(not wild, field, pattern, "a web server lists no files; use {00000..00331}")
    try:
        for name in names:
            file_system, path = _file_system(name)
            if web or not has_magic(name):
                found.append(name)
            else:
                matched = _until_it_passes(partial(file_system.glob, path), name)
                found += [file_system.unstrip_protocol(one) for one in sorted(matched)]
    except ImportError as error:
        remedy = f"pip install 'modstruct[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        refuse(field, pattern, f"{scheme}:// needs a package that is missing: {remedy}")
    except (ValueError, ObjectFailed) as error:
        refuse(field, pattern, f"fsspec cannot read it: {error}")
    require(len(found) > 0, field, pattern, "no object matches; correct the pattern")
    return found


def object_state(url: str) -> tuple[int, int]:
    """Size and version of an object. Raises ObjectFailed, RunError."""
    return read_range(url, 0, 1)[1:]


def several(read: Callable[[Any], Result], items: Sequence[Any]) -> Iterator[Result]:
    """Of each item in order, several at once."""
    with ThreadPoolExecutor(AT_ONCE, "objects") as threads:
        for first in range(0, len(items), WAITING):  # a million that wait would take a gigabyte
            yield from threads.map(read, items[first : first + WAITING])


class ObjectShard:
    """An object that is the same at every read."""

    def __init__(self, url: str, size_bytes: int, version: int):
        self.url, self.state = url, (size_bytes, version)

    def read(self, size: int, begin: int) -> bytes:
        """As os.pread. Raises ObjectFailed, of cause CHANGED for another object than the one that was indexed."""
        if size == 0:
            return b""
        content, *state = read_range(self.url, begin, size)
        if tuple(state) != self.state:
            raise ObjectFailed(CHANGED, "its size, ETag or date is another; start anew to index it again")
        return content


class ObjectFile(io.RawIOBase):
    """An object as a file that is read in pieces."""

    def __init__(self, url: str):
        self.url, (self.size_bytes, self.version) = url, object_state(url)
        self._shard, self._place = ObjectShard(url, self.size_bytes, self.version), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size_bytes}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = self._shard.read(max(0, min(len(buffer), self.size_bytes - self._place)), self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def write_object(url: str, content: bytes) -> None:
    """Raises ObjectFailed, RunError."""
    file_system, path = _file_system(url)
    _until_it_passes(partial(file_system.pipe_file, path, content), url)


def read_range(url: str, begin: int, size: int) -> Piece:
    """`size` bytes, at least one, of an object, or as many as there are. Raises ObjectFailed, RunError."""
    return _until_it_passes(partial(_read_once, url, begin, size), url)


def _read_once(url: str, begin: int, size: int) -> Piece:
    from fsspec.asyn import sync

    file_system, path = _file_system(url)
    get = _GETS.get(EXTRAS.get(_scheme(url), ""))
    if get is None:
        piece = _read_other(file_system, path, begin, size)
    else:
        span = f"bytes={begin}-{begin + size - 1}"
        content, answered, version = sync(file_system.loop, get, file_system, path, span, timeout=REQUEST_SECONDS)
        piece = Piece(content, int(answered.rpartition("/")[2]), _number(version or unsigned(url)))
    if len(piece.content) < min(size, piece.size_bytes - begin):
        raise EOFError("the answer was cut off")
    return piece


Answer = tuple[bytes, str, str]
"""Content, Content-Range and what tells versions apart."""


async def _get_https(file_system: Any, url: str, span: str) -> Answer:
    headers = file_system.kwargs.get("headers", {}) | {"Range": span, "Accept-Encoding": "identity"}
    session = await file_system.set_session()
    async with session.get(file_system.encode_url(url), **file_system.kwargs | {"headers": headers}) as answer:
        answer.raise_for_status()
        if "Content-Range" not in answer.headers:
            raise NotImplementedError(WHOLE_FILES)
        named = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
        return await answer.read(), answer.headers["Content-Range"], named


async def _get_s3(file_system: Any, path: str, span: str) -> Answer:
    bucket, key, _ = file_system.split_path(path)
    answer = await file_system._call_s3("get_object", Bucket=bucket, Key=key, Range=span)
    try:
        if "ContentRange" not in answer:
            raise NotImplementedError(WHOLE_FILES)
        return await answer["Body"].read(), answer["ContentRange"], answer.get("ETag", "")
    finally:
        answer["Body"].close()


async def _get_gs(file_system: Any, path: str, span: str) -> Answer:
    try:
        headers, content = await file_system._call("GET", file_system.url(path), headers={"Range": span})
    except OSError as error:
        if str(error).startswith("Forbidden"):  # as gcsfs says 403
            raise PermissionError(*error.args) from None
        raise
    if "Content-Range" not in headers:
        raise NotImplementedError(WHOLE_FILES)
    return content, headers["Content-Range"], headers.get("X-Goog-Generation", "")


_GETS: dict[str, Callable[[Any, str, str], Awaitable[Answer]]] = {"https": _get_https, "s3": _get_s3, "gs": _get_gs}


def _read_other(file_system: Any, path: str, begin: int, size: int) -> Piece:
    """By what all of fsspec's file systems have: what tells versions apart is asked for before each read."""
    info = file_system.info(path)
    if info["type"] != "file":
        raise IsADirectoryError("a folder")
    names = ("ETag", "etag", "content_md5", "mtime", "modified", "LastModified", "last_modified", "created")
    version = next((str(info[name]) for name in names if info.get(name)), path)
    content = file_system.cat_file(path, start=begin, end=min(begin + size, info["size"]))
    return Piece(content, info["size"], _number(version))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 2


# --- what passes and what does not ---

_failures: dict[str, list[float]] = {}
"""Of each store that does not answer at present, when requests failed."""
_answered: dict[str, tuple[str, str]] = {}
"""The last two objects for which each store answered."""
_given_up: set[str] = set()
"""Objects that failed while their stores answered for others: nobody waits for them again."""


def _until_it_passes(request: Callable[[], Result], url: str) -> Result:
    """The result of a request that is made again while it fails for a reason that may pass."""
    place = urlsplit(without_credentials(url))
    store, pause, first = f"{place.scheme}://{place.netloc}", FIRST_PAUSE_SECONDS, 0.0
    while True:
        try:
            result = request()
        except OUR_FAULTS:
            raise
        except Exception as error:
            if not _may_pass(error):
                _failures.pop(store, None)  # that was an answer
                raise _lasting(error, url) from None
            now, words, shown = time.monotonic(), _words(error), without_credentials(url)
            if url in _given_up:
                raise ObjectFailed("unreadable shard", words) from None
            first, failures = first or now, _failures.setdefault(store, [])
            failures.append(now)
            if len(failures) == SAID_AFTER:
                told = "%s does not answer (%s): it is asked again for %g seconds"
                log.info(told, store, words, PATIENCE_SECONDS)
            # The store's since its first failure, whatever thread's: those that still wait to be read do not start to
            # wait anew. The object's own, since a store that answers for others starts anew at each of them.
            waited, own = now - failures[0], now - first
            if max(waited, own) > PATIENCE_SECONDS:
                if _answers(store, url):
                    _failures.pop(store, None)
                    if own > PATIENCE_SECONDS:
                        _given_up.add(url)
                        told = f"{words}: {shown} failed for {own:.0f} seconds, in which its store answered for others"
                        raise ObjectFailed("unreadable shard", told) from None
                elif waited > PATIENCE_SECONDS:
                    raise RunError(
                        f"{store} has not answered for {waited:.0f} seconds (last of all for {shown}: {words}); go on "
                        "by `--resume latest` when it does"
                    ) from None
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        else:
            _given_up.discard(url)
            last, _ = _answered.get(store, (url, url))
            if last != url or store not in _answered:
                _answered[store] = url, last
            failed = _failures.pop(store, None)
            if failed and (lasted := time.monotonic() - failed[0]) > NAMED_SECONDS:
                told = "%s did not answer for %.0f seconds: %d requests failed and were made again"
                log.warning(told, store, lasted, len(failed))
            return result


def _answers(store: str, url: str) -> bool:
    """Whether a store answers at present for another object than this one."""
    other = next((other for other in _answered.get(store, ()) if other != url), None)
    if other is None:
        return False
    try:
        _read_once(other, 0, 1)
    except Exception as error:
        return not _may_pass(error)
    return True


def _status(error: BaseException) -> int | None:
    """HTTP's status in an error of aiohttp or gcsfs, or of botocore, which s3fs keeps as the cause of its own."""
    response = getattr(error if error.__cause__ is None else error.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _may_pass(error: Exception) -> bool:
    cause = getattr(error, "os_error", error)
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN  # else the name is wrong
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)):
        return False  # the last of them is a wrong certificate, too
    if isinstance(error, TimeoutError) or any(kind.__name__ in PASSING for kind in type(error).__mro__):
        return True
    status = _status(error)
    return isinstance(error, (OSError, EOFError)) if status is None else status >= 500 or status in PASSING_STATUS


def _words(error: Exception) -> str:
    status, said = _status(error), getattr(error, "message", None) or str(error) or type(error).__name__
    words = " ".join(without_credentials(str(said)).split())[:200]
    return words if status is None or str(status) in words else f"{status} {words}"


def _lasting(error: Exception, url: str) -> ObjectFailed:
    status, words, scheme = _status(error), _words(error), _scheme(url)
    if status == 416:
        return ObjectFailed(CHANGED, f"{words}: it is empty, or shorter than it was")
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return ObjectFailed("missing shard", f"{words}: there is no such object; correct the address")
    if isinstance(error, NotImplementedError):
        return ObjectFailed("unreadable shard", words)
    denied = status in (401, 403) or isinstance(error, PermissionError) or "redentials" in words
    remedy = CREDENTIALS.get(EXTRAS.get(scheme, ""), "its credentials") if denied else "correct the address"
    return ObjectFailed("unreadable shard", f"{words}: {remedy}")
