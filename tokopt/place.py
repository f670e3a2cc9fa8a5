"""Files and folders that are put in their place at once: complete or not at all, and never over something else.

What is written has a temporary name beside its place, ``.<name>.<token>.tmp``, and is locked as long as its writer
lives. A writer that was killed leaves it behind; the next one to the same place removes what nobody holds any more.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokopt.errors import ArtifactError, InputError
from tokopt.runtime.format.manifest import MANIFEST

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2
_AT_FDCWD = -100

_ATTEMPTS = 10
"""How often a place may change between a look at it and the move before the writer gives up."""


def check_place(path: Path, overwrite: bool) -> None:
    """Raise ArtifactError unless an artifact can be put at ``path``: nothing is there, or an artifact to overwrite."""
    try:
        _check_name(path)
        if not path.parent.is_dir():
            raise ArtifactError(f"the folder {path.parent} does not exist; create it first")
        if not os.path.lexists(path):
            return
        if not overwrite:
            raise ArtifactError(f"{path} exists already; pass overwrite=True or choose another path")
        if (foreign := _foreign(path)) is not None:
            raise ArtifactError(f"{foreign} and will not be overwritten; move it or choose another path")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(path)!a} can be no artifact ({error}); choose another path") from error


def _check_name(path: Path) -> None:
    """Raise ValueError for a name that neither torch nor ONNX Runtime takes."""
    if "\0" in str(path):
        raise ValueError("the name holds a zero byte")
    str(path).encode()


def _foreign(path: Path) -> str | None:
    """Why what is at ``path`` is not an artifact and nothing else, or None."""
    if path.is_symlink() or not (path / MANIFEST).is_file():
        return f"{path} is no tokopt artifact"
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        listed = {MANIFEST, *manifest["files"]}
        manifest["format_version"]  # other programs have manifests too
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return f"{path} holds a {MANIFEST} that is none of tokopt's"
    found = (item for item in path.rglob("*") if item.is_symlink() or not item.is_dir())
    extra = next((item for item in found if item.relative_to(path).as_posix() not in listed), None)
    return None if extra is None else f"{extra} is not part of the artifact"


@contextmanager
def replacing(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its name at the end, or disappears on any failure.

    Raises ArtifactError when it cannot be written, and when something that must not be overwritten is at ``path``, also
    when it appeared there meanwhile.
    """
    path = path.absolute()
    _recover(path)
    check_place(path, overwrite)
    try:
        with _temporary(path, lambda made: made.mkdir()) as folder:
            yield folder
            _settle(folder)
            _move(folder, path, overwrite)
    except BrokenPipeError:
        raise  # whoever reads the progress has gone
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written ({error}); choose another path or free some space"
        ) from error


def move_artifact(source: Path, path: Path) -> None:
    """Put an artifact in the place of the one at ``path``, if there is one; raises ArtifactError."""
    check_place(path, overwrite=True)
    try:
        _move(source, path, overwrite=True)
        shutil.rmtree(source, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{source} cannot be moved to {path} ({error}); move it yourself") from error


def remove_artifact(path: Path) -> None:
    """Remove the artifact at ``path``, if there is one: at once, as far as its name goes."""
    if path.exists():
        left = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        path.rename(left)
        _remove(left)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there; raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(folder)!a} cannot be made ({error}); choose another folder") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder and be the only process that works in it; raises InputError when another one does."""
    make_folder(folder)
    try:
        lock = _lock(folder, wait=False)
    except BlockingIOError as error:
        raise InputError(
            f"another process works in {folder}; wait for it, or choose another folder"
        ) from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its name at the end, or disappears on any failure; raises InputError."""
    path = path.absolute()
    try:
        _check_name(path)
    except ValueError as error:
        raise InputError(f"{str(path)!a} cannot be written ({error}); choose another path") from error
    try:
        with _temporary(path, lambda made: made.touch(exist_ok=False)) as file:
            yield file
            os.replace(file, path)
    except OSError as error:
        raise InputError(f"{str(path)!a} cannot be written ({error}); choose another path") from error


# --- names while it is written ----------------------------------------------------------------------------


@contextmanager
def _temporary(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new file or folder beside ``path`` with a temporary name, which is gone at the end unless it was moved."""
    _sweep(path)
    made, lock = _make(path, make)
    try:
        yield made
    finally:
        _remove(made)
        if lock is not None:
            os.close(lock)


def _make(path: Path, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """What ``make`` makes, and the lock on it."""
    while True:
        made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        make(made)
        lock = _lock(made, wait=True)
        if made.exists() if lock is None else _is(made, lock):
            return made, lock
        if lock is not None:
            os.close(lock)  # another writer took it for a dead one's, before it was locked


def _sweep(path: Path) -> None:
    """Remove what writers to ``path`` left behind that are no more."""
    for left in _left(path, "tmp"):
        with suppress(BlockingIOError):
            lock = _lock(left, wait=False)
            if lock is not None:
                _remove(left)
                os.close(lock)


def _recover(path: Path) -> None:
    """Put back what a writer had put aside when it was killed, where places cannot be exchanged.

    Where a new artifact is in its place, it is left to :func:`_sweep`; where something else is, it stays.
    """
    for left in _left(path, "old"):
        with suppress(FileNotFoundError, FileExistsError):  # its writer lives, or another one is here
            if not os.path.lexists(path):
                _rename_new(left, path)
            elif _foreign(path) is None:
                left.rename(left.with_suffix(".tmp"))


def _left(path: Path, kind: str) -> list[Path]:
    """The temporary names of ``path`` that are there."""
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return []
    begin, end = f".{path.name}.", f".{kind}"
    tokens = {
        name: name[len(begin) : -len(end)] for name in names if name.startswith(begin) and name.endswith(end)
    }
    return [
        path.with_name(name)
        for name, token in tokens.items()
        if len(token) == 8 and set(token) <= set("0123456789abcdef")
    ]


def _lock(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where there are no locks.

    Raises BlockingIOError when another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None


def _is(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is what a descriptor was opened on."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Have the disk hold what was written, before the name promises it; a disk that is full may say so only now."""
    for item in (*folder.rglob("*"), folder):
        if item.is_dir() and os.name == "nt":
            continue
        descriptor = os.open(item, os.O_RDONLY if item.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- the move ---------------------------------------------------------------------------------------------


def _move(source: Path, path: Path, overwrite: bool) -> None:
    """Give ``source`` the name ``path``; what was there has the name ``source`` afterwards.

    Raises ArtifactError, with everything as it was, when what is there must not be overwritten.
    """
    for _ in range(_ATTEMPTS):
        check_place(path, overwrite)
        try:
            if overwrite and os.path.lexists(path):
                _exchange(source, path)
            else:
                _rename_new(source, path)
            return
        except (FileExistsError, FileNotFoundError):
            if not source.exists():
                raise
    raise ArtifactError(f"{path} is changed by other programs all the time; choose another path")


def _exchange(source: Path, path: Path) -> None:
    """Exchange two names; what was at ``path`` is looked at again, since it may have changed before the exchange.

    It is locked meanwhile: with its temporary name it looks like what a dead writer left. Raises FileNotFoundError when
    another writer was faster.
    """
    lock = _lock(path, wait=True)
    try:
        if lock is not None and not _is(path, lock):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not _renameat2(source, path, _EXCHANGE):
            _put_aside(source, path)
        elif (foreign := _foreign(source)) is not None:
            _renameat2(source, path, _EXCHANGE)
            raise ArtifactError(f"{path}: {foreign} and will not be overwritten; choose another path")
    finally:
        if lock is not None:
            os.close(lock)


def _put_aside(source: Path, path: Path) -> None:
    """Exchange two names by three renames; :func:`_recover` finds what a kill leaves in between."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    os.rename(path, aside)
    try:
        if (foreign := _foreign(aside)) is not None:
            raise ArtifactError(f"{path}: {foreign} and will not be overwritten; choose another path")
        _rename_new(source, path)
    except BaseException:
        _recover(path)
        _sweep(path)
        raise
    with suppress(FileNotFoundError):  # taken away by another writer
        os.rename(aside, source)


def _rename_new(source: Path, path: Path) -> None:
    """Rename to a name that nothing has; raises FileExistsError."""
    if _renameat2(source, path, _NOREPLACE):
        return
    if os.name != "nt" and (source.is_symlink() or not source.is_dir()):  # there, a rename replaces nothing
        os.link(source, path, follow_symlinks=False)
        os.unlink(source)
        return
    try:
        os.rename(source, path)  # elsewhere, a folder replaces nothing but an empty one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error


def _renameat2(source: Path, path: Path, flag: int) -> bool:
    """Rename as Linux can; False where it cannot, or the file system cannot."""
    rename = getattr(_libc(), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(path), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(path))


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
