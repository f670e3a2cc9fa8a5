"""The laws of a schedule: every program that runs has the inputs and outputs that its place gives a meaning to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tokopt.runtime.format.fault import FormatError, require
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.reader import first_double, short
from tokopt.runtime.format.schedule import AFTER, ENTRY_ROLES, Entry, Schedule, Trigger, emits_tokens
from tokopt.runtime.format.signature import BATCH, DRAWING, Signature, TensorLike, find_role, with_role

_READS = frozenset(("tokens", "positions", "mask", "rows", "limit", "parent", *DRAWING, "link", "state"))
_WRITES = frozenset(
    ("logits", "tokens", "count", "logprobs", "confidence", "neighbours", "link", "written", "state")
)

_INPUTS = {"encode": frozenset(("input", "link", "state")), "prefill": _READS, "decode": _READS}
_OUTPUTS = {"encode": frozenset(("output", "link", "done", "state")), "prefill": _WRITES, "decode": _WRITES}
"""Role of an entry -> roles that its program's inputs and outputs may have."""

_HANDED_ON = frozenset(("link", "written", "state"))
"""Roles that the outputs of a program may have that others of the same call follow."""


def check_schedule(
    programs: Mapping[str, Signature], schedule: Schedule, generation: Generation | None
) -> None:
    """Raise FormatError for a schedule that these programs cannot follow."""
    require(bool(schedule.entries), "the schedule has no entry")
    for entry in schedule.entries:
        require(
            entry.role in ENTRY_ROLES,
            f"an entry of the schedule has the role {short(entry.role)}, it must be one of {', '.join(ENTRY_ROLES)}",
        )
        for name in entry.programs:
            require(name in programs, f"the schedule names the program {short(name)}, which is not there")
    _check_order(schedule, generation)
    for entry in schedule.entries:
        _check_entry(entry, programs, generation)
    _check_decodes(programs, tuple(schedule.of_role("decode")))
    encoders = {entry.program: programs[entry.program] for entry in schedule.of_role("encode")}
    _check_caller(encoders)
    _check_exits(encoders, schedule)
    _check_depths(encoders, schedule)
    _check_whole(programs, encoders, schedule)
    _check_commit(programs, schedule)
    for trigger in schedule.triggers:
        _check_trigger(trigger, programs, schedule)
    counts = [trigger.every for trigger in schedule.triggers if trigger.after == "tokens"]
    require(
        not schedule.endless or bool(counts),
        "the schedule is endless and no trigger runs after tokens, so nothing renumbers positions",
    )
    require(
        not schedule.endless or (generation is not None and min(counts) <= generation.context),
        "the schedule is endless and no trigger runs before the context is full, so positions outgrow it",
    )


def _check_order(schedule: Schedule, generation: Generation | None) -> None:
    roles = [entry.role for entry in schedule.entries]
    require(
        roles == sorted(roles, key=ENTRY_ROLES.index),
        "the schedule's entries are not in the order of their roles",
    )
    if double := first_double(f"{name} as {e.role}" for e in schedule.entries for name in e.programs):
        raise FormatError(f"the schedule runs {short(double)} twice")
    prefills, decodes = roles.count("prefill"), roles.count("decode")
    require(
        prefills == (generation is not None),
        f"the schedule has {prefills} entries of role 'prefill', it must have one where there is 'generation', and "
        "none elsewhere",
    )
    require(
        (decodes > 0) == (generation is not None),
        f"the schedule has {decodes} entries of role 'decode', it must have one or more where there is 'generation', "
        "and none elsewhere",
    )
    require(
        generation is not None or not (schedule.triggers or schedule.endless),
        "the schedule has triggers or is endless, and nothing generates",
    )


def _check_entry(entry: Entry, programs: Mapping[str, Signature], generation: Generation | None) -> None:
    require(
        entry.since >= 0 and (not entry.since or entry.role == "decode"),
        f"the entry of program {short(entry.program)} takes over after {entry.since} tokens and does not decode, or "
        "that is below 0",
    )
    require(
        not entry.then or entry.role != "encode",
        f"the entry of program {short(entry.program)} encodes and has further programs; make each an entry",
    )
    for name in entry.programs:
        where = f"program {short(name)} runs as {entry.role} and"
        _check_roles(where, programs[name].inputs, _INPUTS[entry.role])
        last = name == entry.emitter
        _check_roles(where, programs[name].outputs, _OUTPUTS[entry.role] if last else _HANDED_ON)
    _check_slots(entry, programs[entry.program])
    _check_tree(entry, programs[entry.program])
    if generation is not None and entry.role != "encode":
        _check_emission(entry, programs, generation)


def _check_roles(where: str, tensors: Iterable[TensorLike], allowed: frozenset[str]) -> None:
    for tensor in tensors:
        require(
            tensor.role in allowed,
            f"{where} has {short(tensor.name)} of the role {tensor.role!r}, which means nothing there",
        )


def _check_slots(entry: Entry, program: Signature) -> None:
    axes = {axis for tensor in program.inputs if tensor.role != "state" for axis in tensor.axes}
    require(
        entry.slots in axes if isinstance(entry.slots, str) else entry.slots >= 0,
        f"the entry of program {short(entry.program)} needs {short(entry.slots)} slots, which is neither a "
        "number nor an axis of its inputs",
    )


def _check_tree(entry: Entry, program: Signature) -> None:
    """Parents come before their children, and the program takes a tree of so many nodes."""
    parent, where = find_role(program.inputs, "parent"), f"the entry of program {short(entry.program)}"
    require(
        (parent is not None) == bool(entry.tree),
        f"{where} has a tree and its program takes none, or the other way round",
    )
    require(bool(entry.tree) or not entry.lossy, f"{where} has no tree, and says how it accepts one")
    if parent is None:
        return
    require(
        entry.tree[0] == -1 and all(0 <= up < node for node, up in enumerate(entry.tree[1:], 1)),
        f"{where} has a tree that does not begin with its root, or whose parents come after their children",
    )
    axis = parent.axes[0]
    most = axis if isinstance(axis, int) else program.ranges[axis].max
    require(
        isinstance(axis, str) or axis == len(entry.tree),
        f"{where} has a tree of {len(entry.tree)} nodes and its program takes {axis}",
    )
    require(
        most is None or len(entry.tree) <= most,
        f"{where} has a tree of {len(entry.tree)} nodes and its program takes {most} at most",
    )


def _check_emission(entry: Entry, programs: Mapping[str, Signature], generation: Generation) -> None:
    where, reading = f"program {short(entry.emitter)} runs as {entry.role} and", programs[entry.program]
    emitting = programs[entry.emitter]
    logits, tokens = find_role(emitting.outputs, "logits"), find_role(emitting.outputs, "tokens")
    require(
        (logits is None) != (tokens is None), f"{where} must emit either logits or tokens with their count"
    )
    require(
        logits is None or logits.axes[2] == generation.vocabulary,
        f"{where} emits logits of another vocabulary than the {generation.vocabulary} of 'generation'",
    )
    where = f"program {short(entry.program)} runs as {entry.role} and"
    given = find_role(reading.inputs, "tokens"), find_role(reading.inputs, "positions")
    require(
        None not in given or (entry.role == "decode" and tokens is not None),
        f"{where} needs inputs of the roles 'tokens' and 'positions'",
    )
    require(
        entry.role != "prefill" or tokens is None or find_role(emitting.inputs, "limit") is not None,
        f"{where} emits tokens and has no input of the role 'limit', so it cannot be told to emit none "
        "before the prompt's end",
    )
    if given[0] is not None:
        _check_chunks(entry, reading, given[0].axes[1], where)
        for name in entry.then:
            _check_part(name, programs[name], given[0].axes[1], reading)


def _check_chunks(entry: Entry, program: Signature, count: str | int, where: str) -> None:
    """Every number of tokens up to the largest can be read, or just one number; a decode reads one."""
    least = program.ranges[count].min if isinstance(count, str) else 1
    require(least <= 1, f"{where} takes no less than {least} tokens, so it cannot read every text")
    require(
        entry.role != "decode" or isinstance(count, str) or count == 1,
        f"{where} takes {count} tokens in every call, and a row has one to read",
    )


def _check_part(name: str, program: Signature, count: str | int, reading: Signature) -> None:
    """A further program of a call reads as many tokens as the first, whatever their number."""
    for role in ("tokens", "positions", "mask"):
        given = find_role(program.inputs, role)
        require(
            given is None or given.axes[1] == count,
            f"the {role} of program {short(name)} have not the axis {short(count)} of the first program's tokens",
        )
    if isinstance(count, str) and count in program.ranges:
        ours, theirs = program.ranges[count], reading.ranges[count]
        require(
            (ours.min, ours.max) == (theirs.min, theirs.max),
            f"program {short(name)} takes other numbers of tokens than the first program of its call",
        )


def _check_decodes(programs: Mapping[str, Signature], entries: Sequence[Entry]) -> None:
    """Entries that stand for one another: what a call is given, emits and leaves behind is the same for all."""
    require(
        not entries or entries[0].since == 0,
        "the first entry of the schedule that decodes takes over later than with the first token",
    )
    for number, entry in enumerate(entries[1:]):
        first, where = (
            entries[0],
            f"the entry of program {short(entry.program)} is a further one that decodes, and",
        )
        require(
            entry.since > entries[number].since
            if entry.since
            else not number and bool(entry.tree) and not first.tree,
            f"{where} only one may be, with a tree where the first has none, or each takes over after more tokens than "
            "the one before it",
        )
        require(
            not entry.since or not any(each.tree for each in entries),
            f"{where} takes over, and one has a tree",
        )
        one, other = ([programs[name] for name in each.programs] for each in (first, entry))
        for what, ours, theirs in (
            ("is given", _told(one), _told(other)),
            ("emits", _emitted(one), _emitted(other)),
        ):
            require(
                ours == theirs,
                f"{where} {what} {', '.join(sorted(theirs)) or 'nothing'}, where the first has "
                f"{', '.join(sorted(ours)) or 'nothing'}",
            )
        lacking = _changed(one) - _changed(other)
        require(
            not lacking,
            f"{where} leaves the states {', '.join(sorted(lacking))} as they were, which the first changes",
        )


def _told(programs: Sequence[Signature]) -> set[str]:
    """Roles of what a host decides for a call; which token sees which follows from the number of tokens."""
    roles = {tensor.role for program in programs for tensor in program.inputs}
    return roles - {"parent", "mask", "rows", "link", "state"}


def _emitted(programs: Sequence[Signature]) -> set[str]:
    return {tensor.role for program in programs for tensor in program.outputs} - _HANDED_ON


def _changed(programs: Sequence[Signature]) -> set[str]:
    return {tensor.state for p in programs for tensor in p.outputs if tensor.state is not None}


def _check_caller(encoders: Mapping[str, Signature]) -> None:
    """An input that several programs take from the caller is the same for all."""
    seen: dict[str, tuple[str, tuple[str | int, ...]]] = {}
    for name, program in encoders.items():
        for tensor in with_role(program.inputs, "input"):
            kind = (tensor.dtype, tuple(tensor.axes))
            require(
                seen.setdefault(tensor.name, kind) == kind,
                f"input {short(tensor.name)} of program {short(name)} has another dtype or other axes than in "
                "a program before it",
            )


def _check_exits(encoders: Mapping[str, Signature], schedule: Schedule) -> None:
    """Rows that leave have the outputs that the others get at the end; without exits every name is there once."""
    exits = [name for name, program in encoders.items() if find_role(program.outputs, "done") is not None]
    given = {name: with_role(program.outputs, "output") for name, program in encoders.items()}
    if not exits:
        if double := first_double(tensor.name for tensors in given.values() for tensor in tensors):
            raise FormatError(f"two programs give the caller an output {short(double)}")
        return
    *_, last = encoders
    require(
        not schedule.generates,
        f"rows leave after program {short(exits[0])}, though the model generates",
    )
    require(last not in exits, f"program {short(last)} has an output 'done' and no program runs after it")
    for name, tensors in given.items():
        require(
            name in exits or name == last or not tensors,
            f"program {short(name)} gives outputs for the rows alone that did not leave before it",
        )
        require(
            name not in exits or _kinds(tensors) == _kinds(given[last]),
            f"rows leave after program {short(name)}, which has not the outputs of {short(last)}",
        )
    require(
        all(tensor.axes[:1] == (BATCH,) for tensor in given[last]),
        f"the outputs of program {short(last)} have no batch in front, by which rows that left earlier are put back",
    )


def _check_depths(encoders: Mapping[str, Signature], schedule: Schedule) -> None:
    """Blocks are counted on; where rows leave, they are counted everywhere or nowhere."""
    depths = [entry.depth for entry in schedule.entries]
    require(
        all(entry.depth >= 0 and (entry.role == "encode" or not entry.depth) for entry in schedule.entries),
        "an entry of the schedule has a depth below 0, or has one and does not encode",
    )
    counted = [depth for depth in depths if depth]
    require(
        counted == sorted(set(counted)),
        f"the depths {counted} of the schedule's entries do not grow",
    )
    leaving = [
        entry.depth
        for entry in schedule.of_role("encode")
        if find_role(encoders[entry.program].outputs, "done") is not None
    ]
    require(
        not leaving or all(leaving) == any(leaving) == bool(depths[-1]),
        "some of the entries after which rows leave have a depth, and others have none",
    )


def _check_whole(
    programs: Mapping[str, Signature], encoders: Mapping[str, Signature], schedule: Schedule
) -> None:
    """The program that does what all that encode do takes and gives what they do, for a batch of one."""
    name = schedule.whole
    if name is None:
        return
    where = f"the whole of the schedule, program {short(name)},"
    _check_beside(where, name, programs, schedule)
    require(not schedule.generates, f"{where} encodes, and the model generates")
    whole = programs[name]
    _check_roles(where, whole.inputs, frozenset(("input",)))
    _check_roles(where, whole.outputs, frozenset(("output", "depth")))
    *_, last = encoders.values()
    given = {t.name: t for program in encoders.values() for t in with_role(program.inputs, "input")}
    require(
        _kinds(whole.inputs) == _kinds(list(given.values()))
        and _kinds(with_role(whole.outputs, "output")) == _kinds(with_role(last.outputs, "output")),
        f"{where} has not the inputs and outputs of the entries",
    )
    require(
        BATCH in whole.ranges and (whole.ranges[BATCH].min, whole.ranges[BATCH].max) == (1, 1),
        f"{where} takes other batches than one row",
    )


def _check_beside(where: str, name: str, programs: Mapping[str, Signature], schedule: Schedule) -> None:
    """A program that no entry runs."""
    require(name in programs, f"{where} is not there")
    require(name not in schedule.programs, f"{where} is run by an entry")


def _check_commit(programs: Mapping[str, Signature], schedule: Schedule) -> None:
    """The program that keeps a path works on what one program left, which reads any tree and gives logits."""
    name = schedule.commit
    if name is None:
        return
    where = f"the commit of the schedule, program {short(name)},"
    _check_beside(where, name, programs, schedule)
    require(schedule.generates, f"{where} keeps what nothing reads: the model does not generate")
    _check_roles(where, programs[name].inputs, frozenset(("path", "count", "link", "state")))
    _check_roles(where, programs[name].outputs, frozenset(("state",)))
    require(
        all(find_role(programs[name].inputs, role) is not None for role in ("path", "count")),
        f"{where} has no inputs of the roles 'path' and 'count'",
    )
    decodes = tuple(schedule.of_role("decode"))
    require(
        len(decodes) == 1 and not decodes[0].then and not emits_tokens(programs[decodes[0].program]),
        f"{where} keeps what several programs leave, or one that draws its tokens",
    )
    mask = find_role(programs[decodes[0].program].inputs, "mask")
    require(
        mask is not None and isinstance(mask.axes[1], str),
        f"{where} keeps what program {short(decodes[0].program)} leaves, which takes no mask of any number of tokens",
    )
    lacking = _changed([programs[name]]) - _changed([programs[decodes[0].program]])
    require(
        not lacking,
        f"{where} changes the states {', '.join(sorted(lacking))}, which the program that decodes does not",
    )


def _kinds(tensors: Sequence[TensorLike]) -> list[tuple[str, str, tuple[str | int, ...]]]:
    return sorted(((t.name, t.dtype, tuple(t.axes)) for t in tensors), key=lambda kind: kind[0])


def _check_trigger(trigger: Trigger, programs: Mapping[str, Signature], schedule: Schedule) -> None:
    where = f"a trigger of the schedule runs program {short(trigger.program)}, which"
    require(trigger.program in programs, f"{where} is not there")
    program = programs[trigger.program]
    _check_roles(where, program.inputs, frozenset(("state", "due")))
    _check_roles(where, program.outputs, frozenset(("state",)))
    require(
        trigger.after in AFTER,
        f"{where} comes after {short(trigger.after)}, it must be one of {', '.join(AFTER)}",
    )
    counts = trigger.after == "tokens"
    require(
        trigger.every >= 1 if counts else trigger.every == 0,
        f"{where} comes every {trigger.every} tokens after {trigger.after!r}",
    )
    require(counts or not trigger.prompt, f"{where} comes within the prompt, but not after tokens")
    decode = schedule.entry("decode")
    assert decode is not None
    require(
        not counts
        or find_role(program.inputs, "due") is not None
        or not emits_tokens(programs[decode.emitter]),
        f"{where} takes no 'due', though the rows advance by different numbers of tokens",
    )
