"""Predict the time of a program from its shapes: a roofline per op, on rates measured on this machine.

The prediction is for comparing two versions of one program. An op takes the longer of its arithmetic at the
machine's matrix-product rate and its traffic at the machine's copy rate, plus a fixed cost per launch. That
last term, with the matching itself, is why merging does not pay on short inputs.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokopt.analysis.cost import node_bytes, node_flops
from tokopt.ir.graph import is_tensor, size_hint, sizes
from tokopt.ir.program import Program
from tokopt.kernels import declared
from tokopt.kernels.declaration import Work

_LAUNCH = 5e-6
"""Seconds that an engine spends per op beside the op's own work."""


@dataclass(frozen=True)
class Machine:
    """What this machine sustains: float32 matrix products and copies, per second."""

    flops: float
    bytes: float


def measure_machine() -> Machine:
    """Time a matrix product of transformer size and a large copy; takes about a quarter of a second."""
    a, b, large = torch.ones(1024, 768), torch.ones(768, 3072), torch.ones(16 * 2**20)
    target = torch.empty_like(large)
    product, copy = _best(lambda: a @ b), _best(lambda: target.copy_(large))
    return Machine(2 * a.numel() * b.shape[1] / product, 2 * 4 * large.numel() / copy)


def _best(work: Callable[[], object]) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def predict_seconds(program: Program, machine: Machine) -> float:
    """The predicted time of one call of ``program`` under its example inputs."""
    nodes = [n for n in program.module.graph.nodes if n.op == "call_function"]
    return sum(_seconds(_work(node), machine) for node in nodes if _computes(node))


def _seconds(work: Work, machine: Machine) -> float:
    return max(work.flops / machine.flops, work.bytes / machine.bytes) + work.launches * _LAUNCH


def _computes(node: Node) -> bool:
    """Whether the node runs a kernel: token ops (some return tuples), and tensors that are not views."""
    if node.target is operator.getitem:
        return False
    return declared(node.target) is not None or (is_tensor(node) and node_bytes(node) > 0)


def _work(node: Node) -> Work:
    op = declared(node.target)
    return op.work(*map(_shape, node.args)) if op is not None else Work(node_flops(node), node_bytes(node))


def _shape(argument: object) -> object:
    """The shape of a tensor and the value of a number, under the example inputs."""
    if not isinstance(argument, Node):
        return argument
    return sizes(argument) if is_tensor(argument) else size_hint(argument.meta["val"])
