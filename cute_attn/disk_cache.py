"""A directory of compiled things that heals itself and that several processes may share.

Nothing here knows what is stored: an entry is a mapping from names to bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

__all__ = ["DiskCache", "cache_root", "disk_cache_enabled", "write_atomically"]

_MAGIC = b"cute-attn entry 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_root() -> Path:
    """Where this package keeps files for the user.

    ``$CUTE_ATTN_CACHE_DIR``, else ``$XDG_CACHE_HOME/cute-attn``, else ``~/.cache/cute-attn``; for a user without a home
    directory (a container's arbitrary user id), a directory of this process, removed at its end.
    """
    own = os.environ.get("CUTE_ATTN_CACHE_DIR")
    if own:
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "cute-attn"
    try:
        return Path.home() / ".cache" / "cute-attn"
    except RuntimeError:
        return _directory_of_this_process()


@functools.cache
def _directory_of_this_process() -> Path:
    # Not a fixed name: what lies there is run, and somebody else could have put it there.
    directory = tempfile.mkdtemp(prefix="cute-attn-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def disk_cache_enabled() -> bool:
    """Whether compiled programs are kept on disk: ``CUTE_ATTN_DISK_CACHE`` is "1" (the default) or "0".

    Raises ValueError for any other value.
    """
    value = os.environ.get("CUTE_ATTN_DISK_CACHE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"CUTE_ATTN_DISK_CACHE={value!r} is not known; use 1 (keep compiled programs on disk) or 0")
    return value == "1"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that other processes see either nothing, the old content, or all of the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


class DiskCache:
    """Entries by key in one directory.

    An entry is one file, written under another name and renamed, and carries a checksum over all of its content. One
    that fails the check is renamed to ``*.corrupt`` and rebuilt. A lock per key makes the second of two processes that
    want the same entry wait for the first instead of building it again. Where the directory cannot be written,
    entries are built and not kept, which is said once.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._warned = False

    def path(self, key: str) -> Path:
        """The file of one entry. ``key`` is any text; equal keys share a file, different keys never do."""
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.entry"

    def read(self, key: str) -> dict[str, bytes] | None:
        """The entry, or None if there is none that can be used."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            return _decode(content)
        except ValueError:
            with contextlib.suppress(OSError):
                os.replace(path, path.with_suffix(".corrupt"))
            return None

    def get(self, key: str, build: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """The entry, built and kept if it is not there. Whatever ``build`` raises comes out, and nothing is kept."""
        entry = self.read(key)
        if entry is not None:
            return entry
        with self._lock(key):
            entry = self.read(key)
            if entry is None:
                entry = dict(build())
                try:
                    write_atomically(self.path(key), _encode(entry))
                except OSError as error:
                    self._say_not_kept(error)
        return entry

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = open(self.path(key).with_suffix(".lock"), "w")  # noqa: SIM115 - closed below
        except OSError as error:
            self._say_not_kept(error)
            yield
            return
        with file:
            with contextlib.suppress(OSError):  # a file system without locks: two builds are wasteful, not wrong
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _say_not_kept(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"compiled programs are not kept, because {self.directory} cannot be written ({error}); "
                "set CUTE_ATTN_CACHE_DIR to a directory that can, or CUTE_ATTN_DISK_CACHE=0",
                stacklevel=4,
            )


def _encode(entry: Mapping[str, bytes]) -> bytes:
    index = json.dumps({name: len(value) for name, value in entry.items()}).encode()
    body = struct.pack("<Q", len(index)) + index + b"".join(entry.values())
    return _MAGIC + hashlib.sha256(body).digest() + body


def _decode(content: bytes) -> dict[str, bytes]:
    """Raises ValueError for anything but the exact bytes that `_encode` made."""
    start = len(_MAGIC) + _DIGEST_BYTES
    body = content[start:]
    if not content.startswith(_MAGIC) or hashlib.sha256(body).digest() != content[len(_MAGIC) : start]:
        raise ValueError("checksum does not match")
    (index_bytes,) = struct.unpack_from("<Q", body)
    offset = 8 + index_bytes
    entry = {}
    for name, size in json.loads(body[8:offset]).items():
        entry[name] = body[offset : offset + size]
        offset += size
    return entry
