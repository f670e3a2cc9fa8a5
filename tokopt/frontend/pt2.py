"""Reading ``.pt2`` files: whatever torch's reader would execute is refused before torch sees the file.

The reader unpickles entries, loads libraries, evaluates expressions as Python, looks functions up by their names and
writes other names into source code, all as the file asks for. None of it is needed for a program of tensors: weights
are raw bytes, sizes are arithmetic, and nodes call operators.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import typing
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import torch

from tokopt.errors import ArtifactError

_ENTRIES = re.compile(
    r"archive_(format|version)|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/.+",
    re.ASCII,
)
"""Entries of an archive without what torch would execute: pickles, libraries and those of older formats."""

_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")

_OPERATOR = re.compile(
    r"torch\.ops(\.\w+){2,3}|torch\._?sym_\w+|math\.\w+|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|abs|and_|or_|xor|not_|add"
    r"|sub|mul|floordiv|mod|truediv|pow|lshift|rshift|getitem)",
    re.ASCII,
)
_READS_FILES = "torch.ops.aten.from_file"

_FUNCTION = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Abs|floor|ceiling|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|LessThan"
    "|StrictLessThan|GreaterThan|StrictGreaterThan|And|Or|Not|Piecewise|ExprCondPair|FloorDiv|ModularIndexing|Where"
    "|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv"
    "|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|IsNonOverlappingAndDenseIndicator"
)
"""What sizes are computed with."""

_MAX_EXPRESSION = 4096

_SPECS = ("in_spec", "out_spec")
_FREE = ("as_string", "as_strings", "guards_code", "metadata")
"""Keys below which texts are neither names nor evaluated: tokopt has no guards checked."""


def load_pt2(path: Path) -> torch.export.ExportedProgram:
    """``torch.export.load`` of a file that holds nothing to execute; raises ArtifactError."""
    try:
        with path.open("rb") as file:
            _check_archive(file)
            file.seek(0)
            _check_entries(torch._C.PyTorchFileReader(file))
            file.seek(0)
            with _quiet(), _fields_known():
                return torch.export.load(file)
    except _Refused as error:
        raise ArtifactError(
            f"{path} {error}, and is not loaded; save the program again with torch.export.save"
        ) from error
    except Exception as error:  # whatever the archive's readers raise
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path} is not a readable .pt2 file for torch {torch.__version__} ({type(error).__name__}: "
            f"{reason[:300]}); save the program again with torch.export.save"
        ) from error


class _Refused(Exception):
    """What a file holds that is not loaded, without its subject."""


def _check_archive(file: IO[bytes]) -> None:
    """The entries are known ones, whole, and the same for every reader of archives."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        roots = {name.partition("/")[0] for name in names}
        if len(roots) != 1 or len(set(names)) != len(names):
            raise _Refused("holds entries twice, or beside the archive's folder")
        for name in names:
            if not _ENTRIES.fullmatch(name.partition("/")[2]):
                raise _Refused(f"holds {name!a}, which torch would unpickle, execute or not read")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Refused("is compressed, which no program that torch saves is")
        if (damaged := archive.testzip()) is not None:  # torch does not look
            raise _Refused(f"is damaged in {damaged!a}")


def _check_entries(reader: Any) -> None:
    """What torch would read out of the entries, read as torch does."""
    names = set(reader.get_all_records())
    for name in _CONFIGS:
        for weight, entry in json.loads(reader.get_record(name))["config"].items():
            if (
                entry["use_pickle"] is not False
                or f"{name.rpartition('/')[0]}/{entry['path_name']}" not in names
            ):
                raise _Refused(f"holds {weight!a} as a pickle, which may execute code")
    try:
        torch.load(io.BytesIO(reader.get_record("data/sample_inputs/model.pt")), weights_only=True)
    except Exception as error:
        raise _Refused("holds example inputs that are no tensors, or damaged ones") from error
    _check_program(json.loads(reader.get_record("models/model.json")))


def _check_program(value: Any, key: str = "") -> None:
    """Every text in a program is what its place wants."""
    if key in _SPECS:
        _check_tree(json.loads(value)[1])
    elif key in _FREE:
        return
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_program(item, name)
    elif isinstance(value, list):
        for item in value:
            _check_program(item, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_text(text: str, key: str) -> None:
    if key == "expr_str":
        _check_expression(text)
    elif key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(text) or text.startswith(_READS_FILES):
            raise _Refused(f"calls {text[:60]!a}, which is no operator")
    elif not re.fullmatch(r"[\w.+:-]*", text):
        raise _Refused(f"holds {text[:60]!a} where a name stands")


def _check_tree(tree: Any) -> None:
    """Containers of inputs and outputs are registered ones; what a ``defaultdict`` makes would be imported by name."""
    if tree["type"] == "collections.defaultdict":
        raise _Refused("takes or gives a defaultdict, whose contents may execute code")
    for child in tree["children_spec"]:
        _check_tree(child)


def _check_expression(text: str) -> None:
    """A size is arithmetic: torch has Python evaluate it."""
    try:
        tree = ast.parse(text[: _MAX_EXPRESSION + 1], mode="eval").body
        allowed = len(text) <= _MAX_EXPRESSION and _is_arithmetic(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        allowed = False
    if not allowed:
        raise _Refused(f"holds {text[:60]!a} where a size stands")


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int, float))
    if isinstance(node, ast.Name):
        return re.fullmatch(r"[a-z]{1,4}\d+|true|false|oo|int_oo", node.id, re.ASCII) is not None
    if isinstance(node, ast.UnaryOp):
        return _is_arithmetic(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if not _FUNCTION.fullmatch(node.func.id):
        return False
    words = node.func.id in ("Symbol", "Float")  # which are spelled by texts
    return all(map(_is_word if words else _is_arithmetic, node.args)) and all(
        isinstance(fact.value, ast.Constant) and isinstance(fact.value.value, int) for fact in node.keywords
    )


def _is_word(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and re.fullmatch(r"[\w.+-]+", str(node.value), re.ASCII) is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says of a file beside raising."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _fields_known() -> Iterator[None]:
    """Let torch ask once for the types of a class's fields, not for each of its objects: a third of the time."""
    find, known = typing.get_type_hints, dict[object, dict[str, Any]]()

    def hints(kind: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if kind not in known:
            known[kind] = find(kind, *args, **kwargs)
        return known[kind]

    with patch.object(typing, "get_type_hints", hints):
        yield
