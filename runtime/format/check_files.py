"""The laws of an artifact's files: they are those that the manifest lists, and ONNX files are what it says they are."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tokopt.errors import ArtifactError
from tokopt.runtime.format.entries import ONNX_FORMS, Manifest, ProgramEntry
from tokopt.runtime.format.files import file_fault, file_path
from tokopt.runtime.format.onnx_file import Malformed, OnnxFile, OnnxValue, read_onnx
from tokopt.runtime.format.reader import first_double, short
from tokopt.runtime.format.signature import Tensor


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for the first of :func:`find_faults`."""
    for fault in find_faults(folder, manifest):
        raise ArtifactError(fault)


def find_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of an artifact: sizes, hashes, and what an ONNX file says of itself."""
    damaged: set[str] = set()
    for name, entry in manifest.files.items():
        fault = file_fault(folder, name, entry)
        if fault is not None:
            damaged.add(name)
            yield fault
    for program in manifest.programs.values():
        for form in ONNX_FORMS:
            if program.files.get(form, "") in manifest.files.keys() - damaged:
                try:
                    check_onnx(folder, program, form, manifest.files)
                except ArtifactError as error:
                    yield str(error)


def check_onnx(folder: Path, program: ProgramEntry, form: str, listed: Mapping[str, object]) -> Path:
    """The path of an ONNX form of a program, proved to have its signature and to refer to listed files alone.

    Raises ArtifactError.
    """
    name = program.files[form]
    path = file_path(folder, name)
    try:
        with path.open("rb") as stream:
            if not path.stat().st_size:
                raise Malformed("it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = read_onnx(data)
    except (Malformed, OSError) as error:
        raise ArtifactError(f"{path} is no ONNX file ({error}); copy or export the artifact again") from error
    _check_locations(folder, name, found, listed)
    given, made = program.inputs, program.outputs
    fault = _side_fault("input", given, found.inputs) or _side_fault("output", made, found.outputs)
    if fault is not None:
        raise ArtifactError(f"{path} contradicts the manifest: {fault}; copy or export the artifact again")
    return path


def _check_locations(folder: Path, name: str, found: OnnxFile, listed: Mapping[str, object]) -> None:
    for location in sorted(found.locations):
        beside = (PurePosixPath(name).parent / location).as_posix()
        if beside not in listed:
            raise ArtifactError(
                f"{folder / name} refers to the file {short(location)}, which the manifest does not list; do not use "
                "this artifact"
            )
        file_path(folder, beside)


def _side_fault(side: str, tensors: Sequence[Tensor], values: Sequence[OnnxValue]) -> str | None:
    """What the inputs or outputs of a file are not, in a few words."""
    if double := first_double(value.name for value in values):
        return f"it has the {side} {short(double)} twice"
    known = {value.name: value for value in values}
    if other := set(known).symmetric_difference(tensor.name for tensor in tensors):
        where = "the manifest" if min(other) in known else "it"
        return f"{where} lacks the {side} {short(min(other))}"
    for tensor in tensors:
        value = known[tensor.name]
        sizes = None if value.axes is None else [a if isinstance(a, int) else "?" for a in value.axes]
        wanted = [a if isinstance(a, int) else "?" for a in tensor.axes]
        if (value.dtype, sizes) != (tensor.dtype, wanted):
            axes = "unknown" if value.axes is None else [a or "?" for a in value.axes]
            return f"its {side} {short(tensor.name)} is {value.dtype or 'unknown'} {axes}, not {tensor}"[:300]
    return None
