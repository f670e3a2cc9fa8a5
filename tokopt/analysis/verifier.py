"""The laws that every Bundle keeps; checked before and after every pass."""

from __future__ import annotations

from torch.fx import Node

from tokopt.analysis.graph import dtype_name
from tokopt.bundle import Bundle, Program
from tokopt.errors import PassError


def verify_bundle(bundle: Bundle) -> None:
    """Check graph lint, signature, example shapes and state wiring of every program.

    Raises PassError naming the program and the first law that is broken.
    """
    if not bundle.programs:
        raise PassError("the bundle has no program")
    for name, program in bundle.programs.items():
        try:
            _verify_program(program)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise PassError(f"program {name!r} is not well-formed: {error}") from error
    outputs = {spec.name for p in bundle.programs.values() for spec in p.outputs}
    inputs = {spec.name for p in bundle.programs.values() for spec in p.inputs}
    for state in bundle.states:
        if state.name not in inputs or state.output not in outputs:
            raise PassError(
                f"state {state.name!r} is not wired: no such input, or no output {state.output!r}"
            )


def _verify_program(program: Program) -> None:
    exported = program.exported
    exported.graph.lint()
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    inputs = [placeholders[name] for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    _require(len(inputs) == len(program.inputs), f"{len(inputs)} inputs, {len(program.inputs)} specs")
    for node, spec, example in zip(inputs, program.inputs, program.example, strict=True):
        _check_value(node, spec.name, spec.dtype, spec.axes)
        _require(dtype_name(example.dtype) == spec.dtype, f"example of {spec.name!r} is {example.dtype}")
        static = [(s, a) for s, a in zip(example.shape, spec.axes, strict=True) if isinstance(a, int)]
        _require(all(s == a for s, a in static), f"example of {spec.name!r} has shape {tuple(example.shape)}")
    outputs = exported.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    _require(len(outputs) == len(program.outputs), f"{len(outputs)} outputs, {len(program.outputs)} specs")
    for node, spec in zip(outputs, program.outputs, strict=True):
        assert isinstance(node, Node)
        _check_value(node, spec.name, spec.dtype, spec.axes)
    named = {axis for spec in program.inputs for axis in spec.axes if isinstance(axis, str)}
    _require(
        named == set(program.ranges), f"named axes {sorted(named)} but ranges for {sorted(program.ranges)}"
    )


def _check_value(node: Node, name: str, dtype: str, axes: tuple[str | int, ...]) -> None:
    value = node.meta["val"]
    _require(dtype_name(value.dtype) == dtype, f"{name!r} is {value.dtype}, its spec says {dtype}")
    _require(len(value.shape) == len(axes), f"{name!r} has {len(value.shape)} axes, its spec has {len(axes)}")
    for size, axis in zip(value.shape, axes, strict=True):
        _require(
            isinstance(size, int) == isinstance(axis, int),
            f"{name!r}: axis {axis!r} does not fit size {size}",
        )
        _require(not isinstance(axis, int) or size == axis, f"{name!r}: size {size}, spec {axis!r}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
