"""Files that outlast a crash: locks that the system releases, and files that are replaced in one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:                                     # Windows: no locks of this kind, everybody may go on
    fcntl = None


def lock(descriptor: int) -> bool:
    """Hold an open file or folder until it is closed or the process ends, however it ends.  False: somebody holds it.

    True, with nothing held, where the system or the file system has no such locks (Windows, folders on some networks).
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[bool]:
    """A context that holds a folder that is there; the value says whether it could be had."""
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def open_locked(path: Path) -> TextIO | None:
    """A regular file, made if it is not there, open for reading and writing and locked; None if somebody holds it.

    OSError for a link, which would lead to another file (who means that file resolves it), and for what is no file.
    """
    how = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, how, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace", newline="\n")
        if not lock(file.fileno()):
            file.close()
            return None
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()                                    # renamed between the opening and the lock: once more


def in_place(path: Path) -> bool:
    """Is this a device, a pipe or another way to say stdout?  Such a thing is written to and never replaced."""
    links = ("/proc/", "fd/", "/dev/fd/")               # /dev/stdout on Linux and macOS, which may lead to a regular file
    if str(path).startswith(("/proc/", "/dev/fd/")) or path.is_symlink() and os.readlink(path).startswith(links):
        return True
    return path.exists() and not path.is_dir() and not stat.S_ISREG(path.stat().st_mode)


@contextlib.contextmanager
def replacing(path: Path, part: str) -> Iterator[Path]:
    """A new file, called `part` beside `path`, that takes its place on the disk in one rename when the block ends well.

    When it does not, nothing is left of the new file, and the old one stands.
    """
    new = path.with_name(part)
    fresh(new)
    try:
        yield new
        put(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def fresh(path: Path) -> None:
    """A new, empty file.  What has its name is unlinked, not written to: it may be a link to a file of somebody else's."""
    path.unlink(missing_ok=True)
    path.touch(exist_ok=False)


def put(new: Path, path: Path) -> None:
    """Give a finished file its place in one rename, which a power cut undoes as a whole or not at all."""
    with open(new, "rb+") as file:
        os.fsync(file.fileno())                         # else the rename may reach the disk before what it names
    os.replace(new, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
