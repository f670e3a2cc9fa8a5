"""Fusions as rules: what each one looks at, what it rewrites, and why it leaves the rest as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import onnx_ir as ir

from tokopt.ir.graph import innermost

Site = TypeVar("Site")
"""What a rule has found out about the nodes that it rewrites."""

Candidate = Sequence[ir.Node]
"""Nodes that a rule may rewrite together, in the graph's order."""


class Unfit(Exception):
    """A rule leaves a candidate as it is; the text is the reason."""


class Rule(ABC, Generic[Site]):
    """One fusion. ``name`` says what becomes of what, for the user."""

    name: ClassVar[str]

    @abstractmethod
    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """What a user would expect to be fused. The next one is asked for when the one before was rewritten."""

    @abstractmethod
    def match(self, graph: ir.Graph, candidate: Candidate) -> Site:
        """What :meth:`fuse` has to know; nothing is changed yet. Raises Unfit with the reason why not."""

    @abstractmethod
    def fuse(self, graph: ir.Graph, site: Site) -> None:
        """Rewrite the graph, in place."""


@dataclass(frozen=True)
class Left:
    """A candidate that stayed as it is: where it is in the user's model, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What one rule did to a graph: how many of its candidates are rewritten, and which are left."""

    rule: str
    fused: int
    left: tuple[Left, ...]

    @property
    def candidates(self) -> int:
        """How many there were."""
        return self.fused + len(self.left)

    def __str__(self) -> str:
        text = f"{self.rule}: {self.fused} of {self.candidates}"
        for reason in dict.fromkeys(left.reason for left in self.left):
            places = [left.where for left in self.left if left.reason == reason]
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            text += f"; left {len(places)}: {reason} ({places[0]}{more})"
        return text


def apply_rule(rule: Rule[Site], graph: ir.Graph) -> Outcome:
    """Rewrite every candidate that fits, in place."""
    fused, left = 0, list[Left]()
    for candidate in rule.candidates(graph):
        try:
            site = rule.match(graph, candidate)
        except Unfit as reason:
            left.append(Left(place(candidate[0]), str(reason)))
            continue
        rule.fuse(graph, site)
        fused += 1
    return Outcome(rule.name, fused, tuple(left))


def place(node: ir.Node) -> str:
    """Where a node comes from: the dotted path of the module in the user's model, or the node's own name.

    The exporter notes the path as ``": Model/encoder: Encoder/encoder.mlp: MLP/linear: aten.linear.default"``.
    """
    scopes = (node.metadata_props.get("namespace") or "").split("/")[:-1]
    return innermost(scope.partition(":")[0].strip() for scope in scopes) or node.name or node.op_type
