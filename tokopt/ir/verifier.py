"""The laws that every Bundle keeps; checked before and after every pass."""

from __future__ import annotations

from torch.fx import Node

from tokopt.analysis.graph import dtype_name, is_call, value_users
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, State
from tokopt.ir.export import placeholders
from tokopt.ir.program import Program
from tokopt.kernels import ops


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
    for state in bundle.states:
        _verify_state(bundle, state)


def _verify_state(bundle: Bundle, state: State) -> None:
    """A state is an input and an output of some program, of one dtype and one shape everywhere.

    One that the main program writes in place is read there by nothing but the ``cache_write`` that makes its
    next value: any other reader might see the new entries before or after they are written.
    """
    wired = False
    for name, program in bundle.programs.items():
        inputs = {spec.name: spec for spec in program.inputs}
        outputs = {spec.name: spec for spec in program.outputs}
        if state.name not in inputs or state.output not in outputs:
            continue
        wired = True
        for spec in (inputs[state.name], outputs[state.output]):
            if (spec.dtype, spec.axes) != (state.dtype, state.axes):
                raise PassError(
                    f"program {name!r}: {spec.name!r} is {spec.dtype}{list(spec.axes)}, the state is "
                    f"{state.dtype}{list(state.axes)}"
                )
        if state.in_place and program is bundle.main and not _is_written_in_place(program, state):
            raise PassError(f"program {name!r}: the state {state.name!r} is not only written in place")
    if not wired:
        raise PassError(f"state {state.name!r} is not wired: no such input, or no output {state.output!r}")


def _is_written_in_place(program: Program, state: State) -> bool:
    index = [spec.name for spec in program.inputs].index(state.name)
    cache = placeholders(program.module)[index]
    result = program.module.graph.output_node().args[0]
    assert isinstance(result, (tuple, list))
    written = result[[spec.name for spec in program.outputs].index(state.output)]
    assert isinstance(written, Node)
    return is_call(written, ops.cache_write) and written.args[0] is cache and value_users(cache) == [written]


def _verify_program(program: Program) -> None:
    graph = program.module.graph
    graph.lint()
    inputs = placeholders(program.module)
    _require(len(inputs) == len(program.inputs), f"{len(inputs)} inputs, {len(program.inputs)} specs")
    for node, spec, example in zip(inputs, program.inputs, program.example, strict=True):
        _check_value(node, spec.name, spec.dtype, spec.axes)
        _require(dtype_name(example.dtype) == spec.dtype, f"example of {spec.name!r} is {example.dtype}")
        static = [(s, a) for s, a in zip(example.shape, spec.axes, strict=True) if isinstance(a, int)]
        _require(all(s == a for s, a in static), f"example of {spec.name!r} has shape {tuple(example.shape)}")
    outputs = graph.output_node().args[0]
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
