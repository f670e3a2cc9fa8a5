"""A request on its way through a schedule: which program runs when, and on what."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tokopt.arguments import wrong
from tokopt.errors import InputError, TokoptError
from tokopt.runtime.buffers import BLOCK
from tokopt.runtime.encode import Encoded, carry, needed_slots
from tokopt.runtime.engines.base import Stateful
from tokopt.runtime.format.link import Port
from tokopt.runtime.format.manifest import Manifest, ProgramEntry
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger
from tokopt.runtime.format.signature import BATCH, SEVERAL, find_role, with_role
from tokopt.runtime.format.state import State, slot_axis
from tokopt.runtime.sampling import Sampling

PREFILL = 256
"""Prompt tokens per call; bounds the memory that a long prompt's attention takes."""

PADDING = -1
"""Position of padding."""

NO_LIMIT = 2**40

LAST = np.array([-1])
"""``rows`` of the last token alone."""


@dataclass(frozen=True)
class Emission:
    """What a call gave: logits [batch, rows, vocabulary], or tokens [batch, n] of which the first count [batch] count.

    ``logprobs`` [batch, n] are the logarithms of the tokens' probabilities, where the program gives them, and
    ``confidence`` [batch] says where it does how sure it is of what the next call would propose. ``neighbours``
    [batch, n, k] are the tokens nearest to each that was read, where a program of logits gives them. Arrays are valid
    until the next call. ``seconds`` is what the call of a step took.
    """

    logits: np.ndarray | None = None
    tokens: np.ndarray | None = None
    count: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    confidence: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    seconds: float = 0.0

    def repeated(self, times: int) -> Emission:
        """What a call would have given with every row so many times, but for neighbours."""
        return Emission.joined([self], lambda arrays: arrays[0].repeat(times, 0))

    @classmethod
    def joined(
        cls,
        parts: Sequence[Emission],
        join: Callable[[Sequence[np.ndarray]], np.ndarray] = np.concatenate,
    ) -> Emission:
        """What a call would have given for the rows of several, but for neighbours."""
        made: dict[str, np.ndarray] = {}
        for name in ("logits", "tokens", "count", "logprobs", "confidence"):
            arrays = [getattr(part, name) for part in parts]
            if arrays[0] is not None:
                made[name] = join(arrays)
        return cls(**made, seconds=sum(part.seconds for part in parts))


@dataclass(frozen=True)
class Snapshot:
    """A request at one moment: its states without free slots, what links carry, and how far triggers have counted."""

    states: Mapping[str, np.ndarray]
    links: Mapping[Port, np.ndarray]
    since: tuple[np.ndarray, ...]

    @classmethod
    def joined(cls, manifest: Manifest, parts: Sequence[Snapshot]) -> Snapshot:
        """The rows of several requests of one model, each as it is there; raises InputError where they do not fit.

        A table of what a model has seen follow what is one for all rows: the first one stands for all.
        """
        states = {
            state.name: _joined_state(state, [part.states[state.name] for part in parts])
            for state in manifest.states
        }
        lasting = [port for port in parts[0].links if _lasts(manifest, port)]
        links = {port: _joined_links(port, [part.links[port] for part in parts]) for port in lasting}
        since = tuple(map(np.concatenate, zip(*(part.since for part in parts), strict=True)))
        return cls(states, links, since)


def _joined_state(state: State, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One state of several requests, with as many slots as the longest; free ones are as at the start of a request."""
    if BATCH not in state.axes:
        if state.kind != "table" and not all(np.array_equal(array, arrays[0]) for array in arrays):
            raise InputError(
                f"state {state.name!r} is one for all rows of a batch, and differs; let the texts go on one by one"
            )
        return arrays[0]
    axis = slot_axis(state.axes)
    if axis is not None:
        place = state.axes.index(axis)
        most = max(array.shape[place] for array in arrays)
        free = [
            [(0, most - array.shape[i] if i == place else 0) for i in range(array.ndim)] for array in arrays
        ]
        arrays = [
            np.pad(array, width, constant_values=np.array(state.initial, array.dtype))
            for array, width in zip(arrays, free, strict=True)
        ]
    return np.concatenate(arrays, state.axes.index(BATCH))


def _joined_links(port: Port, arrays: Sequence[np.ndarray]) -> np.ndarray:
    if len({array.shape[1:] for array in arrays}) > 1:
        raise InputError(
            f"{port.name!r} of program {port.program!r} has another size for every text; let them go on one by one"
        )
    return np.concatenate(arrays)


def _lasts(manifest: Manifest, target: Port) -> bool:
    """Whether a link's value is read by a later call than the one that made it."""
    source = next(link.source.program for link in manifest.links if link.target == target)
    readers = (entry.programs for entry in manifest.schedule.entries if target.program in entry.programs)
    return any(source not in programs for programs in readers)


@dataclass(frozen=True)
class _Roles:
    """Names of a program's inputs and outputs by role; those of links, which may be several, apart."""

    given: Mapping[str, str]
    linked: tuple[str, ...]
    made: Mapping[str, str]

    @classmethod
    def of(cls, program: ProgramEntry) -> _Roles:
        """The names of one program."""
        return cls(
            {tensor.role: tensor.name for tensor in program.inputs if tensor.role not in SEVERAL},
            tuple(tensor.name for tensor in with_role(program.inputs, "link")),
            {tensor.role: tensor.name for tensor in program.outputs if tensor.role not in SEVERAL},
        )


def chunk_size(manifest: Manifest) -> int:
    """The most tokens that one call of the program that reads prompts takes of a text of any length."""
    entry = manifest.schedule.entry("prefill")
    assert entry is not None
    tokens = find_role(manifest.programs[entry.program].inputs, "tokens")
    if tokens is None:
        return 1
    axis = tokens.axes[1]
    return (
        axis
        if isinstance(axis, int)
        else min(PREFILL, manifest.programs[entry.program].ranges[axis].max or PREFILL)
    )


def prompt_slots(manifest: Manifest, longest: int) -> int:
    """Slots to begin with for a prompt of ``longest`` tokens, as far as they are not evicted."""
    schedule = manifest.schedule
    bounds = [trigger.every for trigger in schedule.triggers if trigger.prompt]
    return min([longest, *bounds]) + _extra(schedule)


def _extra(schedule: Schedule) -> int:
    """The most slots that a call which decodes needs whatever it is given."""
    return max(
        (entry.slots for entry in schedule.of_role("decode") if isinstance(entry.slots, int)), default=0
    )


class Request:
    """One batch on its way: the states, the values of links, and how far the triggers have counted.

    ``written`` is how many tokens calls that decode have written since the last prompt. ``neighbours``
    [batch, nodes, k] are the tokens nearest to those of the nodes that were verified last, where the program says them.
    """

    def __init__(
        self,
        manifest: Manifest,
        programs: Stateful,
        batch: int,
        slots: int,
        encoded: Encoded | None = None,
        drawing: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """``slots`` are those to begin with; ``drawing`` tells a program that draws tokens how, by default greedily.

        Raises InputError when the states do not fit into memory.
        """
        self.manifest, self.programs, self.batch = manifest, programs, batch
        self.schedule = manifest.schedule
        self.drawing = Sampling().drawing(batch) if drawing is None else drawing
        self.buffers: Any = programs.buffers(batch, slots)
        self.links: dict[Port, np.ndarray] = {}
        self.used: dict[str, int] = dict.fromkeys(self.buffers.slots, 0)
        if encoded is not None:
            self.links = dict(encoded.links)
            self.buffers.load(encoded.states)
            self.used = self.buffers.occupied()
        self._counting = [trigger for trigger in self.schedule.triggers if trigger.after == "tokens"]
        self.since = [np.zeros(batch, np.int64) for _ in self._counting]
        self.written = 0
        self.program: Any = None
        self._bound: dict[str, Any] = {}
        names = (*self.schedule.programs, *filter(None, (self.schedule.commit,)))
        self._roles = {name: _Roles.of(manifest.programs[name]) for name in names}
        self._mask = np.zeros((batch, 0, 0), bool)
        self._verified = 0
        self.neighbours: np.ndarray | None = None
        self._telling = [link for link in manifest.links if link.target.program == self.schedule.commit]
        self._links = [link for link in manifest.links if link not in self._telling]
        self._told: dict[Port, np.ndarray] = {}

    # ------------------------------------------------------------------------------------------- entries

    def prefill(
        self, prompts: Sequence[Sequence[int]], limit: np.ndarray | None = None, start: int = 0
    ) -> Emission:
        """Read the prompts, the shorter ones padded on the left; what follows their ends, of logits one row.

        ``limit`` [batch] is the most tokens that a row may commit, for a program that draws them. ``start`` is the
        position of the first tokens: as many were read before. Raises InputError for a prompt that is longer than the
        program can read at once, where it must.
        """
        if len(prompts) != self.batch or not all(len(ids) for ids in prompts):
            raise InputError(f"there are {len(prompts)} prompts; give {self.batch}, none of them empty")
        entry, self.written = self.entry("prefill"), 0
        tokens, positions = self._padded(entry, prompts, start)
        total, done = tokens.shape[1], 0
        emission = Emission()
        while done < total:
            size = self._prompt_part(entry, positions[:, done:])
            part = slice(done, done + size)
            done += size
            read = self._prompt_tokens(entry, positions[:, part])[:, -1]
            most = np.zeros(self.batch, np.int64)
            if done == total and limit is not None:
                most = self.allowed(limit, read)
            emission = self.emit(entry, tokens[:, part], positions[:, part], LAST, most)
            self._count([trigger.prompt for trigger in self._counting], read)
        if emission.count is not None:
            self._count([True] * len(self._counting), emission.count)
        self.after_prompt()
        return emission

    def resume(self, drawing: Mapping[str, np.ndarray] | None = None) -> Request:
        """Have what follows drawn as by a new request: as ``drawing`` says, from its first random number on."""
        self.drawing = Sampling().drawing(self.batch) if drawing is None else drawing
        counters = [state for state in self.manifest.states if state.kind == "counter"]
        if counters:
            self.buffers.load({s.name: np.full_like(self.buffers.read(s.name), s.initial) for s in counters})
            self._forget_bound()
        return self

    def snapshot(self, row: int | None = None) -> Snapshot:
        """A copy of everything that :meth:`restore` needs to go on from here; of one row, for a request of one."""
        used, states = self.buffers.occupied(row), dict[str, np.ndarray]()
        for state in self.manifest.states:
            axis, array = slot_axis(state.axes), self.buffers.read(state.name, row)
            if axis is not None:
                array = array.take(range(used[axis]), state.axes.index(axis))
            states[state.name] = array
        rows = slice(None) if row is None else slice(row, row + 1)
        links = {port: array[rows] for port, array in self.links.items()}  # whose batch is in front, by law
        return Snapshot(states, links, tuple(counts[rows].copy() for counts in self.since))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to where a request of this model and batch was."""
        self.buffers.load(snapshot.states)
        self.links = dict(snapshot.links)
        self.since = [counts.copy() for counts in snapshot.since]
        self.used = self.buffers.occupied()
        self._verified, self._told = 0, {}
        self._forget_bound()

    @classmethod
    def joined(cls, requests: Sequence[Request], drawing: Mapping[str, np.ndarray] | None = None) -> Request:
        """A request with the rows of several that have read their prompts, each of which goes on as it would alone.

        They are left as they are. Raises InputError for a schedule that does not tell rows apart, and when the states
        do not fit into memory.
        """
        first = requests[0]
        for trigger in first.schedule.triggers:
            due = find_role(first.manifest.programs[trigger.program].inputs, "due")
            if trigger.after == "tokens" and due is None:
                raise InputError(
                    f"program {trigger.program!r} works on all rows of a batch at once; let the texts go on one by one"
                )
        made = cls(
            first.manifest, first.programs, sum(request.batch for request in requests), 0, None, drawing
        )
        made.restore(Snapshot.joined(first.manifest, [request.snapshot() for request in requests]))
        return made

    def repeated(self, times: int) -> Request:
        """A request with every row so many times, each of which goes on by itself; this one is not to be used again."""
        made = Request(self.manifest, self.programs, self.batch * times, 0)
        taken = self.snapshot()
        axes = {state.name: state.axes for state in self.manifest.states}
        states = {
            name: array.repeat(times, axes[name].index(BATCH)) if BATCH in axes[name] else array
            for name, array in taken.states.items()
        }
        made.restore(
            Snapshot(
                states,
                {port: array.repeat(times, 0) for port, array in taken.links.items()},
                tuple(counts.repeat(times) for counts in taken.since),
            )
        )
        made.written = self.written
        return made

    def after_prompt(self) -> None:
        """Run the triggers that come once the prompt is read."""
        for trigger in self.schedule.triggers:
            if trigger.after == "prefill":
                self.run_trigger(trigger, np.ones(self.batch, bool))

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        rows: np.ndarray = LAST,
        limit: np.ndarray | None = None,
        role: str = "decode",
        mask: np.ndarray | None = None,
        nodes: int | None = None,
    ) -> Emission:
        """What follows new tokens [batch, n]; triggers run when it is time.

        ``limit`` [batch] is the most tokens that a row may commit, for a program that draws them. ``role`` tells the
        entry that reads them. ``mask`` [batch, n, n] bool says which new token (row) sees which (column), by default
        itself and those before it. ``nodes`` are as many of the tree's as are proposed, by default all; with one, the
        program runs that proposes none, where there is one. Raises InputError for a mask of another shape, or that the
        program cannot take.
        """
        most = None if limit is None else self.allowed(limit)
        entry = self.schedule.decode(nodes, self.written) if role == "decode" else self.entry(role)
        assert entry is not None
        if nodes is not None:
            entry = replace(entry, tree=entry.tree[:nodes])
        begun = time.perf_counter()
        emission = self.emit(entry, tokens, positions, rows, most, mask)
        emission = replace(emission, seconds=time.perf_counter() - begun)
        count = tokens.shape[1] if emission.count is None else int(emission.count.max())
        self.written = self.written + count if role == "decode" else 0
        if self._counting:
            read = emission.count if emission.count is not None else np.full(self.batch, tokens.shape[1])
            self._count([True] * len(self._counting), read)
        return emission

    def verify(self, tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits [batch, nodes, vocabulary] after every node of a row's tree; :meth:`commit` is to keep a path of it.

        ``tokens`` [batch, nodes] have their parents before them, ``positions`` [batch, nodes] are the root's and as
        many more as a node is deep (-1: no node), and ``mask`` [batch, nodes, nodes] bool says that a node (row) sees
        its ancestors and itself (columns). Raises InputError for an artifact without the pass ``verify``.
        """
        if self.schedule.commit is None:
            raise InputError("the model cannot take proposed tokens back; make it with the pass verify")
        entry = self.schedule.decode(1, self.written)
        assert entry is not None
        self._verified = tokens.shape[1]
        rows = np.arange(self._verified, dtype=np.int64)
        emission = self.emit(entry, tokens, positions, rows, mask=mask)
        self.neighbours = emission.neighbours
        assert emission.logits is not None
        return emission.logits

    def commit(self, path: np.ndarray, count: np.ndarray) -> None:
        """Keep the first ``count`` [batch] of the nodes ``path`` [batch, nodes] that the last call verified.

        The cache is as if these had been read one by one, and then the triggers run that are due. Where all that was
        read stays where it is, no program runs. Raises InputError for what is no path of the last tree, or is longer
        than a trigger allows (:meth:`allowed`).
        """
        nodes, name = self._verified, self.schedule.commit
        self._check_path(path, count, nodes)
        assert name is not None
        kept = np.where(np.arange(nodes) < count[:, None], path, -1)
        if nodes > 1 and (kept != np.arange(nodes))[count > 0].any():
            self._call(name, {"path": path, "count": count})
            self.used = {axis: used - nodes + int(count.max()) for axis, used in self.used.items()}
        self._told = {}
        self.written += int(count.max())
        self._count([True] * len(self._counting), count)

    def _check_path(self, path: np.ndarray, count: np.ndarray, nodes: int) -> None:
        shapes, wanted = (path.shape, count.shape), ((self.batch, nodes), (self.batch,))
        if not nodes or shapes != wanted or path.dtype != np.int64 or count.dtype != np.int64:
            raise InputError(
                f"path is {path.dtype}{list(path.shape)} and count {count.dtype}{list(count.shape)}; give int64"
                f"{list(wanted[0])} and int64{list(wanted[1])}, once after verify"
            )
        most = self.allowed(np.full(self.batch, nodes))
        if not ((path >= 0) & (path < nodes)).all() or not ((count >= 0) & (count <= most)).all():
            raise InputError(
                f"path has nodes from {path.min()} to {path.max()}, and count {count.tolist()} of them; of {nodes} "
                f"nodes rows may keep {most.tolist()}"
            )
        self._verified = 0

    def bind(self, name: str, program: Any) -> None:
        """Let a program that is bound to this request's buffers be the one that runs."""
        self.program = self._bound[name] = program

    def allowed(self, limit: np.ndarray, prompt: np.ndarray | int = 0) -> np.ndarray:
        """``limit`` [batch], and no more than the tokens left to a row's next trigger.

        ``prompt`` is how many of the prompt's tokens are read in the same call, of all rows or [batch].
        """
        for trigger, since in zip(self._counting, self.since, strict=True):
            left = trigger.every - since - (prompt if trigger.prompt else 0)
            limit = np.minimum(limit, np.where(left > 0, left, trigger.every))
        return limit.astype(np.int64)

    def entry(self, role: str) -> Entry:
        """The entry of role ``"prefill"``, or the first of role ``"decode"``."""
        entry = self.schedule.entry(role)
        assert entry is not None
        return entry

    def _padded(
        self, entry: Entry, prompts: Sequence[Sequence[int]], start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and positions [batch, n]; a program of a fixed number of tokens gets a multiple of them."""
        longest = max(map(len, prompts))
        axis = self._tokens_axis(entry)
        if isinstance(axis, int):
            longest = -(-longest // axis) * axis
        tokens = np.zeros((len(prompts), longest), np.int64)
        positions = np.full((len(prompts), longest), PADDING)
        for row, ids in enumerate(prompts):
            tokens[row, longest - len(ids) :] = ids
            positions[row, longest - len(ids) :] = start + np.arange(len(ids))
        return tokens, positions

    def _tokens_axis(self, entry: Entry) -> str | int:
        tokens = find_role(self.manifest.programs[entry.program].inputs, "tokens")
        assert tokens is not None
        return tokens.axes[1]

    def _prompt_tokens(self, entry: Entry, positions: np.ndarray) -> np.ndarray:
        """How many tokens of a row there are up to each place [batch, n], as triggers count them.

        Padding counts for a program of a fixed number of tokens alone, as it is there for a batch of one.
        """
        fixed = isinstance(self._tokens_axis(entry), int)
        return (np.ones_like(positions) if fixed else positions != PADDING).cumsum(axis=1)

    def _prompt_part(self, entry: Entry, positions: np.ndarray) -> int:
        """How many of the places [batch, n] that are left are read in one call; no row passes its next trigger."""
        left = positions.shape[1]
        axis, size = self._tokens_axis(entry), min(left, chunk_size(self.manifest))
        if self._reads_at_once(entry):
            most = axis if isinstance(axis, int) else self.manifest.programs[entry.program].ranges[axis].max
            if most is not None and left > most:
                raise InputError(
                    f"the prompt has {left} tokens and is read at once, {most} at most; shorten it"
                )
            return left
        if isinstance(axis, int):
            return size
        tokens = self._prompt_tokens(entry, positions[:, :size])
        for trigger, since in zip(self._counting, self.since, strict=True):
            if trigger.prompt:
                fits = (tokens <= (trigger.every - since)[:, None]).all(axis=0)
                size = min(size, int(fits.sum()))
        return size

    def _reads_at_once(self, entry: Entry) -> bool:
        links = (link for link in self.manifest.links if link.target.program in entry.programs)
        return any(link.when == "once" for link in links)

    # --------------------------------------------------------------------------------------------- calls

    def emit(
        self,
        entry: Entry,
        tokens: np.ndarray,
        positions: np.ndarray,
        rows: np.ndarray = LAST,
        limit: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> Emission:
        """One call of an entry, which no trigger counts; raises InputError for tokens that are not of the batch."""
        self._check_tokens(tokens, positions)
        values = self._values(entry, tokens, positions, rows, limit)
        if mask is not None:
            values["mask"] = self._checked_mask(entry, mask, tokens.shape[1])
        self._reserve(entry, values)
        results: dict[str, np.ndarray] = {}
        for name in entry.programs:
            results = self._call(name, values)
        roles = self._roles[entry.emitter]
        if "logits" in roles.made:
            self._occupy(tokens.shape[1])
            found, near = results[roles.made["logits"]], results.get(roles.made.get("neighbours", ""))
            return Emission(found if "rows" in roles.given else found[:, rows], neighbours=near)
        emission = Emission(
            tokens=results[roles.made["tokens"]],
            count=results[roles.made["count"]].copy(),
            logprobs=results.get(roles.made.get("logprobs", "")),
            confidence=results.get(roles.made.get("confidence", "")),
        )
        self._check_counts(entry, emission, limit)
        assert emission.count is not None
        self._occupy(int(emission.count.max()) + (tokens.shape[1] if entry.role == "prefill" else 0))
        return emission

    def _check_tokens(self, tokens: object, positions: object) -> None:
        shapes: list[tuple[int, ...]] = []
        for name, array in (("tokens", tokens), ("positions", positions)):
            found = cast("NDArray[np.int64]", array)
            if not (isinstance(array, np.ndarray) and found.dtype == np.int64 and found.ndim == 2):
                raise wrong(name, cast(object, array), "an int64 array [batch, tokens]")
            shapes.append(found.shape)
        if shapes[0] != shapes[1] or shapes[0][0] != self.batch or not shapes[0][1]:
            raise InputError(
                f"tokens has shape {list(shapes[0])} and positions {list(shapes[1])}; give [{self.batch}, tokens] "
                "for both"
            )

    def _values(
        self,
        entry: Entry,
        tokens: np.ndarray,
        positions: np.ndarray,
        rows: np.ndarray,
        limit: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        """What a call is told, by role."""
        return {
            "tokens": np.ascontiguousarray(tokens),
            "positions": np.ascontiguousarray(positions),
            "rows": rows,
            "parent": np.array(entry.tree, np.int64),
            "limit": np.full(self.batch, NO_LIMIT) if limit is None else limit,
            "mask": self._causal(tokens.shape[1]),
            **self.drawing,
        }

    def _causal(self, count: int) -> np.ndarray:
        """[batch, count, count] bool: each token sees itself and those before it. Made anew for another count."""
        if self._mask.shape[1] != count:
            causal = np.tril(np.ones((count, count), bool))
            self._mask = np.ascontiguousarray(np.broadcast_to(causal, (self.batch, count, count)))
        return self._mask

    def _checked_mask(self, entry: Entry, mask: object, count: int) -> np.ndarray:
        if not any("mask" in self._roles[name].given for name in entry.programs):
            raise InputError(f"program {entry.program!r} takes no mask; leave it out")
        wanted = (self.batch, count, count)
        found = type(mask).__name__
        if isinstance(mask, np.ndarray):
            array = cast(np.ndarray, mask)
            if array.dtype == bool and array.shape == wanted:
                return np.ascontiguousarray(array)
            found = f"{array.dtype}{list(array.shape)}"
        raise InputError(
            f"mask is {found}, it must be a numpy array bool{list(wanted)} [batch, tokens, tokens]"
        )

    def _reserve(self, entry: Entry, values: Mapping[str, np.ndarray]) -> None:
        """Have the free slots that a call needs."""
        self._switch(entry.program)
        given = self._roles[entry.program].given
        feed = {name: values[role] for role, name in given.items()}
        slots = needed_slots(entry, self.manifest.programs[entry.program], feed)
        if self._lacks(slots):
            self.used = self.buffers.occupied()
        if self._lacks(slots):
            sizes = self.buffers.roomy({axis: self.used[axis] + slots for axis in self.buffers.slots})
            self.buffers.resize({axis: max(size, self.buffers.slots[axis]) for axis, size in sizes.items()})
            self._rebind()

    def _call(self, name: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call of a program on what its roles stand for; what it gives for others is kept."""
        roles = self._roles[name]
        feed = {given: values[role] for role, given in roles.given.items()}
        values_of = self._told if name == self.schedule.commit else self.links
        feed |= {linked: values_of[Port(name, linked)] for linked in roles.linked}
        self._switch(name)
        results = self.program.run(feed)
        telling = self._telling if self._verified > 1 else []
        for links, kept in ((self._links, self.links), (telling, self._told)):
            made = {link.source.name: link for link in links if link.source.program == name}
            carry(links, name, {source: np.array(results[source]) for source in made}, kept)
        return results

    def _switch(self, name: str) -> None:
        """Let a program be the one that runs, on the states that the one before left."""
        if name not in self._bound:
            self.bind(name, self.programs.bind(name, self.buffers))
        elif self.program is not self._bound[name]:
            self.program = self._bound[name]
            self.program.follow()

    def _rebind(self) -> None:
        """Bind the program that runs to buffers of other sizes; the others are bound anew when they are to run."""
        self._bound = {name: bound for name, bound in self._bound.items() if bound is self.program}
        if self.program is not None:
            self.program.bind()

    def _forget_bound(self) -> None:
        """Have every program bound anew before it runs: states lie in other memory."""
        self._bound, self.program = {}, None

    def _lacks(self, slots: int) -> bool:
        return any(self.used[axis] + slots > size for axis, size in self.buffers.slots.items())

    def _occupy(self, slots: int) -> None:
        """Note that no row occupies more than so many slots beyond those before."""
        self.used = {axis: used + slots for axis, used in self.used.items()}

    def _check_counts(self, entry: Entry, emission: Emission, limit: np.ndarray | None) -> None:
        """A call gives at least one token to every row that may have one, so that every text ends; none below 0."""
        assert emission.tokens is not None and emission.count is not None
        tokens, count = (cast("NDArray[np.int64]", array) for array in (emission.tokens, emission.count))
        most = tokens.shape[1]
        allowed = [1] * self.batch if limit is None else limit.tolist()
        for row, (given, may) in enumerate(zip(count.tolist(), allowed, strict=True)):
            if not 0 <= given <= most or (given == 0 and may > 0):
                raise TokoptError(
                    f"program {entry.program!r} committed {given} of {most} tokens in row {row}, which may have one or "
                    "more; the artifact is damaged"
                )
            if any(token < 0 for token in tokens[row, :given].tolist()):
                raise TokoptError(
                    f"program {entry.program!r} found NaN or infinity where it draws a token of row {row}; its weights "
                    "or its input are damaged"
                )

    # ------------------------------------------------------------------------------------------ triggers

    def _count(self, which: Sequence[bool], tokens: np.ndarray) -> None:
        """Add the tokens [batch] to the counts of these triggers, and run those that are due."""
        for i, counts in enumerate(which):
            if counts:
                self.since[i] = self.since[i] + tokens
        for i, trigger in enumerate(self._counting):
            due = self.since[i] >= trigger.every
            if which[i] and due.any():
                self.run_trigger(trigger, due)

    def run_trigger(self, trigger: Trigger, due: np.ndarray) -> None:
        """Let a program work on the states of the rows that are due [batch], and give back the memory it frees."""
        program = self.manifest.programs[trigger.program]
        given = find_role(program.inputs, "due")
        if given is None:
            due = np.ones_like(due)
        feed = {} if given is None else {given.name: due}
        self.buffers.advance(self.programs.best(trigger.program, self.batch), program, feed)
        for i, other in enumerate(self._counting):
            if other.program == trigger.program:
                self.since[i] = np.where(due, 0, self.since[i])
        self.used = self.buffers.occupied()
        if due.all():
            room = self._room()
            self.buffers.resize({axis: used + room for axis, used in self.used.items()})
        self._rebind()

    def _room(self) -> int:
        """Free slots after a trigger: as many as are filled until the next one, or until the context ends."""
        assert self.manifest.generation is not None
        every = min((trigger.every for trigger in self._counting), default=BLOCK)
        return min(every, self.manifest.generation.context) + max(_extra(self.schedule) - 1, 0)
