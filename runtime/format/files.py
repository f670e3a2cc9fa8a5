"""The files of an artifact: names that stay inside its folder, sizes and hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tokopt.errors import ArtifactError
from tokopt.runtime.format.reader import Invalid, read_relative


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hexadecimal) and size in bytes of one file of the artifact."""

    sha256: str
    size: int


def file_path(folder: Path, name: str) -> Path:
    """The path of a file of the artifact, proved to stay inside ``folder``; raises ArtifactError.

    Names are relative POSIX paths without ``..``; no component may be a symbolic link.
    """
    try:
        read_relative(name, "file name")
    except Invalid as error:
        raise ArtifactError(f"{folder}: {error}; do not use this artifact") from error
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise ArtifactError(
                f"{path} is a symbolic link, which may leave the artifact; copy the file itself"
            )
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing, though the manifest lists it; copy or export the artifact again"
        )
    return path


def file_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    """One sentence on what is wrong with a file (missing, size, SHA-256), or None."""
    try:
        path = file_path(folder, name)
        size = path.stat().st_size
        if size != entry.size:
            return (
                f"{path} has {size} bytes, the manifest says {entry.size}; copy or export the artifact again"
            )
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except ArtifactError as error:
        return str(error)
    except OSError as error:
        return f"{folder / name} cannot be read ({error}); copy the artifact again"
    if digest != entry.sha256:
        return f"{path} is damaged: its SHA-256 is not the manifest's; copy or export the artifact again"
    return None


def describe_file(path: Path) -> FileEntry:
    """The entry of an existing file."""
    with path.open("rb") as stream:
        return FileEntry(hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size)
