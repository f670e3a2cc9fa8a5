"""Which program of a model runs when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokopt.runtime.format.signature import Signature, find_role

ENTRY_ROLES = ("encode", "prefill", "decode")
"""In the order in which they run."""

AFTER = ("prefill", "tokens")


@dataclass(frozen=True)
class Entry:
    """A program that the host runs.

    ``role`` is ``"encode"`` (once per request), ``"prefill"`` (on the prompt) or ``"decode"`` (until the text ends).

    ``slots`` is how many free slots a call needs on every slot axis: a number, or the name of an axis of the program's
    inputs, such as that of its tokens.

    ``tree`` is for a program that proposes tokens: of every node the one that it follows, -1 of the first, which is the
    last committed token. Its first n nodes are a tree, too, so that a host may propose fewer. An entry without one
    beside it proposes none, and is what runs where nothing is to be proposed.

    ``then`` are the programs that run after it in the same call, in their order, of a program that was cut: all are
    told the same, links carry what the earlier ones give, and the last one emits.

    ``since`` is for several programs that decode, one after another: how many tokens were decoded since the prompt when
    this one takes over. All rows of a batch go on together: the row that has most counts.

    ``depth`` is for models in stages: how many of the model's blocks are computed once the program has run, those of
    the entries before it included. 0 says nothing of it.

    ``lossy`` is for a program that proposes tokens: a sentence that says how the rule by which it accepts them changes
    the text. Empty: it does not, however many tokens are proposed.
    """

    program: str
    role: str
    slots: int | str = 0
    tree: tuple[int, ...] = ()
    then: tuple[str, ...] = ()
    since: int = 0
    depth: int = 0
    lossy: str = ""

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs of one call, in their order."""
        return (self.program, *self.then)

    @property
    def emitter(self) -> str:
        """The program whose outputs are those of the call."""
        return self.programs[-1]


@dataclass(frozen=True)
class Trigger:
    """A program that works on the states alone, between calls.

    ``after`` is ``"prefill"``: once, when the prompt was read; or ``"tokens"``: for the rows that committed ``every``
    tokens since the program last ran for them. ``prompt``: the prompt's tokens count too, so that it is read ``every``
    tokens at a time with the program in between.
    """

    program: str
    after: str
    every: int = 0
    prompt: bool = False


@dataclass(frozen=True)
class Schedule:
    """All that a host needs to drive a model, beside the roles of inputs and outputs.

    Entries that encode run one after another, in their order. Those that decode stand for one another: a call runs one
    of them, the first where nothing speaks for another. What a call emits follows from the roles of the program's
    outputs: arrays, logits that the host draws from, or tokens with their count. ``endless``: a text may outgrow the
    context of :class:`.Generation`, since a trigger renumbers positions.

    ``whole`` names a program that no entry runs: it does for a batch of one what all entries of role ``"encode"`` do
    together, exits included, for hosts that can only call one program. Its output of role ``"depth"`` is the depth at
    which the row left.

    ``commit`` names another, with which a host may have several tokens verified in one call: the entry that decodes
    reads a tree of them, by a mask in which each sees its ancestors and itself, and gives logits after every one. Then
    this program keeps, of the slots that the call wrote, those of a path [batch, nodes] of nodes in their order, the
    first ``count`` [batch] of it, as if these had been read alone.
    """

    entries: tuple[Entry, ...]
    triggers: tuple[Trigger, ...] = ()
    endless: bool = False
    whole: str | None = None
    commit: str | None = None

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs that entries run, each once, in the order of their first run."""
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.programs))

    def of_role(self, role: str) -> Iterator[Entry]:
        """The entries of a role in the order of running."""
        return (entry for entry in self.entries if entry.role == role)

    def entry(self, role: str) -> Entry | None:
        """The entry of role ``"prefill"``, or the first of role ``"decode"``; None without one."""
        return next(self.of_role(role), None)

    def decode(self, nodes: int | None = None, written: int = 0) -> Entry | None:
        """What decodes when a call proposes a tree of so many nodes, the committed token included, by default all.

        A single node runs as an entry without a tree where there is one. ``written`` is how many tokens were decoded
        since the prompt.
        """
        if nodes != 1 and self.proposing is not None:
            return self.proposing
        plain = [entry for entry in self.of_role("decode") if entry.since <= written]
        return next((entry for entry in reversed(plain) if not entry.tree), plain[0] if plain else None)

    def shares(self, tokens: int) -> dict[Entry, float]:
        """The share that each entry decodes of the first so many tokens after a prompt, one in a call.

        Where tokens are proposed it is the first entry that decodes.
        """
        first = self.entry("decode")
        if first is None or self.proposing is not None:
            return {} if first is None else {first: 1.0}
        plain = [entry for entry in self.of_role("decode") if entry.since < tokens]
        ends = [entry.since for entry in plain[1:]] + [tokens]
        return {
            entry: (end - entry.since) / tokens
            for entry, end in zip(plain, ends, strict=True)
            if end > entry.since
        }

    @property
    def proposing(self) -> Entry | None:
        """The entry that decodes and proposes tokens; None where none does."""
        return next((entry for entry in self.of_role("decode") if entry.tree), None)

    @property
    def speculates(self) -> bool:
        """Whether a call may be given several tokens of which some are taken back."""
        return self.proposing is not None or self.commit is not None

    @property
    def generates(self) -> bool:
        """Whether the model writes texts."""
        return self.entry("decode") is not None


def emits_tokens(program: Signature) -> bool:
    """Whether a program draws tokens itself, instead of giving logits to draw from."""
    return find_role(program.outputs, "tokens") is not None
