"""Predict the time of a program from its shapes: a roofline per op, on rates measured on this machine.

The prediction is for comparing two versions of one program. An op takes the longer of its arithmetic at the
machine's matrix-product rate and its traffic at the machine's copy rate, plus a fixed cost per launch. That
last term, with the matching itself, is why merging does not pay on short inputs.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokopt.analysis.cost import node_bytes, node_flops
from tokopt.analysis.graph import is_tensor, sizes
from tokopt.ir.program import Program

_LAUNCH = 5e-6
"""Seconds that an engine spends per op beside the op's own work."""


@dataclass(frozen=True)
class Machine:
    """What this machine sustains: float32 matrix products and copies, per second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class _Work:
    flops: float
    bytes: float
    launches: int = 1

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops, self.bytes / machine.bytes) + self.launches * _LAUNCH


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
    return sum(_work(node).seconds(machine) for node in nodes if _computes(node))


def _computes(node: Node) -> bool:
    """Whether the node runs a kernel: token ops (some return tuples), and tensors that are not views."""
    if node.target is operator.getitem:
        return False
    return _token_op(node) is not None or (is_tensor(node) and node_bytes(node) > 0)


def _token_op(node: Node) -> str | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "tokopt":
        return target.overloadpacket.__name__
    return None


def _work(node: Node) -> _Work:
    op = _token_op(node)
    if op is None:
        return _Work(node_flops(node), node_bytes(node))
    return _token_work(op, node)


def _token_work(op: str, node: Node) -> _Work:
    """Arithmetic, traffic and launches of a token op, by the largest matrix that it builds."""
    first = sizes(node.args[0])  # type: ignore[arg-type]
    traffic = 8.0 * math.prod(first)
    if op in ("bipartite_match", "energy_match"):
        batch, tokens, channels = first
        rows = tokens // 2 if op == "bipartite_match" else tokens
        pairs = batch * rows * rows
        return _Work(2 * pairs * channels, traffic + 4 * 4 * pairs, 40)
    if op == "farthest_point":  # a loop: every chosen token costs a pass over all of them
        batch, tokens, channels = first
        steps = tokens - _removed(node, 2)
        return _Work(
            2 * batch * steps * tokens * channels, batch * steps * tokens * channels * 4.0, 10 * steps
        )
    if op in ("merge_tokens", "nearest_kept"):
        batch, _, channels = first
        keep, drop = (node.args[2], node.args[3]) if op == "merge_tokens" else (node.args[1], node.args[2])
        pairs = batch * sizes(keep)[1] * sizes(drop)[1]  # type: ignore[arg-type]
        return _Work(2 * pairs * channels, traffic + 4 * 3 * pairs, 30)
    return _Work(0, traffic, 3)


def _removed(node: Node, position: int) -> int:
    r = node.args[position]
    if isinstance(r, Node):
        r = r.meta["val"]
    return int(r) if isinstance(r, int) else int(r.node.hint)  # type: ignore[union-attr]
