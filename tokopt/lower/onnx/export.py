"""Lower a Program to ONNX, opset 23 (24 with a cache): one portable graph per program, weights in external data.

The file uses the standard domain and model-local functions of the domain ``tokopt`` only, so any ONNX
runtime executes it. After export the graph is folded, its masks are brought into the form that ONNX Runtime
takes, the axes get the names of the signature, and the result is compared with the exported program.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch.export import ExportedProgram

import tokopt.kernels
from tokopt import __version__
from tokopt.errors import LoweringError
from tokopt.ir.assemble import assemble
from tokopt.ir.bundle import fresh
from tokopt.ir.export import axis_names, user_inputs
from tokopt.ir.memory import trim
from tokopt.ir.program import Program
from tokopt.lower.onnx.embedding import GatherCodes
from tokopt.lower.onnx.experts import place_experts
from tokopt.lower.onnx.fusions import MergeProducts, MergeSums
from tokopt.lower.onnx.real_tokens import assume_real_tokens
from tokopt.lower.onnx.rule import Outcome, apply_rule
from tokopt.lower.onnx.simplify import simplify
from tokopt.lower.onnx.storage import StoreByOutput, StoreMinimum
from tokopt.lower.onnx.translate import translate
from tokopt.lower.onnx.weights import pack_weights
from tokopt.lower.parity.check import check_parity

OPSET = 23
"""The first opset with ``Attention``; only a cache that is written in place needs a newer one."""

WEIGHTS = "weights.data"


class WeightFile:
    """The external data of a bundle: every distinct tensor once, whichever programs use it."""

    def __init__(self, directory: Path, name: str = WEIGHTS) -> None:
        self.directory, self.name = directory, name
        self._places: dict[bytes, tuple[int, int]] = {}

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write ``tensor`` unless its bytes are there already; return the reference that replaces it."""
        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._places[key] = (self._append(data), len(data))
        offset, length = self._places[key]
        return ir.ExternalTensor(
            self.name,
            offset,
            length,
            ir.DataType(tensor.dtype),
            shape=ir.Shape(list(tensor.shape.numpy())),
            name=tensor.name or "",
            base_dir=self.directory,
        )

    def place_all(self, graph: ir.Graph) -> None:
        """Let every large constant of a graph be a reference to where it lies; equal ones become one."""
        known: dict[object, ir.Value] = {}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > 1024 and not isinstance(tensor, ir.ExternalTensor):
                tensor = value.const_value = self.place(tensor)
            if isinstance(tensor, ir.ExternalTensor):
                place = (tensor.offset, tensor.length, tensor.dtype, tuple(tensor.shape.numpy()))
                if (first := known.setdefault(place, value)) is not value:
                    value.replace_all_uses_with(first)
                    del graph.initializers[name]

    def _append(self, data: bytes) -> int:
        with (self.directory / self.name).open("ab") as stream:
            alignment = 4096 if len(data) >= 4096 else 64  # whole pages can be memory-mapped
            stream.write(bytes(-stream.tell() % alignment))
            offset = stream.tell()
            stream.write(data)
        return offset


def lower(
    program: Program,
    directory: Path,
    name: str,
    *,
    weights: WeightFile | None = None,
    metadata: Mapping[str, str] | None = None,
    check: bool = True,
    tolerance: float | None = None,
    original: Program | None = None,
    compared: Collection[str] | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> Path:
    """Write ``directory/<name>.onnx`` and its external data; return the path of the ONNX file.

    ``weights`` is shared by the programs of a bundle. ``metadata`` goes into the file's properties. ``check``
    compares ONNX Runtime with the exported program, output by output, on the example and on one more size of
    every named axis; ``tolerance`` replaces the largest NMSE that the dtype of an output allows. ``original`` is the
    program before it was cleaned up, which is then what the result must compute, and ``compared`` names its outputs
    that have to agree (see :func:`check_parity`). ``report`` is told what every fusion did and left.

    Raises LoweringError when an operator has no ONNX form, when the graph does not pass the ONNX checker, and
    when the two disagree.
    """
    _check_dtypes(program, name)
    assembled = assemble(program)
    model = _export(assembled, name)
    _name_values(model.graph, program)
    model.producer_name, model.producer_version = "tokopt", __version__
    model.metadata_props.update(metadata or {})
    model.graph.name = name
    _name_axes(model, axis_names(user_inputs(assembled), program.inputs), program)
    expand_masks(model)
    with _quiet():
        simplify(model)
    expand_rotary_tables(model)
    place_experts(model)
    outcomes = [apply_rule(GatherCodes(model), model.graph)]
    pack_weights(model)
    outcomes += [apply_rule(MergeProducts(), model.graph), apply_rule(MergeSums(), model.graph)]
    for outcome in outcomes:
        if report is not None and outcome.candidates:
            report(outcome)
    assume_real_tokens(model)
    passes.RemoveUnusedNodesPass()(model)
    apply_rule(StoreByOutput(), model.graph)
    apply_rule(StoreMinimum(), model.graph)
    passes.RemoveUnusedNodesPass()(model)
    # Only now: shape inference inside a body, where inputs have no shape, gets the rank of Max wrong.
    tokopt.kernels.attach_functions(model)
    weights = weights or WeightFile(directory)
    weights.place_all(model.graph)
    trim()
    path = directory / f"{name}.onnx"
    write_checked(model, path, f"program {name!r}")
    if check:
        check_parity(original or program, path, name, lowered=program, tolerance=tolerance, names=compared)
    return path


def write_checked(model: ir.Model, path: Path, what: str) -> None:
    """Write a model; raises LoweringError, which says whose graph it is, where ONNX's checker refuses it."""
    ir.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"the ONNX graph of {what} is not valid: {_sentence(error)}") from error


def expand_masks(model: ir.Model) -> None:
    """Give every attention mask real query and key axes, in place.

    ONNX lets a mask broadcast; ONNX Runtime's ``Attention`` lets it do so over batch and heads only and
    rejects ``[batch, 1, 1, keys]``. Masks whose last two sizes are known to fit are left alone; layers that
    share a mask and the names of its sizes share the expanded one.
    """
    expanded: dict[tuple[object, object, object], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        query, key, mask = node.inputs[0], node.inputs[1], node.inputs[3]
        assert query is not None and key is not None
        rows, columns = _size(query, -2), _size(key, -2)
        if None not in (rows, columns) and (_size(mask, -2), _size(mask, -1)) == (rows, columns):
            continue
        place = (mask, query if rows is None else rows, key if columns is None else columns)
        if place not in expanded:
            expanded[place] = _insert_expand(model.graph, node, query, key, mask)
        node.replace_input_with(3, expanded[place])


def expand_rotary_tables(model: ir.Model) -> None:
    """Give the tables of every fused rotary embedding the batch of what they rotate, in place.

    The pattern that is fused broadcasts a table ``[1, tokens, channels]`` over the batch; the operator does not.
    """
    expanded: dict[tuple[object, object], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain:
            continue
        x, *tables = (value for value in node.inputs[:3] if value is not None)
        rows = _size(x, -len(x.shape)) if x.shape is not None else None
        for i, table in enumerate(tables, start=1):
            by_position = table.shape is not None and len(table.shape) == 2
            if by_position or (rows is not None and _size(table, -3) == rows):
                continue
            place = (table, rows or x)
            if place not in expanded:
                batch = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
                one = ir.node("Constant", [], attributes={"value_ints": [1, 1]})
                shape = ir.node("Concat", [batch.outputs[0], one.outputs[0]], attributes={"axis": 0})
                expand = ir.node("Expand", [table, shape.outputs[0]])
                model.graph.insert_before(node, [batch, one, shape, expand])
                expanded[place] = expand.outputs[0]
            node.replace_input_with(i, expanded[place])


def _size(value: ir.Value, axis: int) -> int | str | None:
    """The size of an axis as a number or a name; None when unknown."""
    if value.shape is None or len(value.shape) < -axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def _insert_expand(
    graph: ir.Graph, node: ir.Node, query: ir.Value, key: ir.Value, mask: ir.Value
) -> ir.Value:
    """``Expand(mask, [queries, keys])``: it broadcasts both ways, so batch and heads of the mask stay."""
    rows = ir.node("Shape", [query], attributes={"start": -2, "end": -1})
    columns = ir.node("Shape", [key], attributes={"start": -2, "end": -1})
    shape = ir.node("Concat", [rows.outputs[0], columns.outputs[0]], attributes={"axis": 0})
    expand = ir.node("Expand", [mask, shape.outputs[0]])
    graph.insert_before(node, [rows, columns, shape, expand])
    return expand.outputs[0]


def _check_dtypes(program: Program, name: str) -> None:
    for spec in (*program.inputs, *program.outputs):
        if spec.dtype == "bfloat16":
            raise LoweringError(
                f"{spec.name!r} of program {name!r} is bfloat16, which numpy cannot hold; capture the model in "
                "float32 (model.float()), or convert it inside the model"
            )


def _export(assembled: ExportedProgram, name: str) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():  # with gradients, attention is traced in another layout
            return translate(assembled, OPSET)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise LoweringError(f"program {name!r} has no ONNX form: {_sentence(error)}") from error


def _name_values(graph: ir.Graph, program: Program) -> None:
    """Give inputs and outputs the names of the signature; an output that has a name already is a copy.

    Such are inputs and parameters that are returned as they are, and values that are returned twice.
    """
    taken = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for place, value in enumerate(graph.outputs):
        if id(value) in taken:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[place] = copy.outputs[0]
        taken.add(id(graph.outputs[place]))
    named = [
        *zip(graph.inputs, program.inputs, strict=True),
        *zip(graph.outputs, program.outputs, strict=True),
    ]
    known = {spec.name for _, spec in named}
    inner = (value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs)
    for value in (*graph.initializers.values(), *inner):
        if value.name in known:
            value.name = fresh(value.name, known)
            known.add(value.name)
    for value, spec in named:
        value.name = spec.name


def _name_axes(model: ir.Model, names: Mapping[str, str], program: Program) -> None:
    """Spell symbols (``s77``) as the signature's axes; inputs and outputs get exactly its axes."""
    symbol = re.compile("|".join(rf"\b{re.escape(key)}\b" for key in names) or r"(?!)")
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_spell(dim, symbol, names) for dim in value.shape])
    for values, specs in ((model.graph.inputs, program.inputs), (model.graph.outputs, program.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.axes)


def _spell(dim: int | ir.SymbolicDim, symbol: re.Pattern[str], names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return symbol.sub(lambda found: names[found[0]], dim.value)


def _sentence(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((row.strip() for row in str(error).splitlines() if row.strip()), "")
    return f"{type(error).__name__}: {line}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on packages it does not find and on its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
