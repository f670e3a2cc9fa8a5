"""Every law of a model's description has a description that breaks it, and an error that says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.runtime.toys import (
    STATES,
    VOCABULARY,
    choosing,
    encoder,
    evictor,
    half,
    halves,
    program,
    reader,
    reads,
    taking_over,
    toy,
)
from tokopt.runtime.format.checks import FormatError, check_format
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.manifest import Manifest, ProgramEntry
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger
from tokopt.runtime.format.signature import Range, Tensor, find_role
from tokopt.runtime.format.state import Occupancy, State

Y, DONE = Tensor("y", "float32", ("batch", 1), "output"), Tensor("done", "bool", ("batch",), "done")
X = Tensor("x", "float32", ("batch", 2), "input")


def check(manifest: Manifest) -> None:
    check_format(manifest.programs, manifest.states, manifest.links, manifest.schedule, manifest.generation)


def test_the_toys_keep_every_law() -> None:
    check(toy())
    check(choosing())
    check(halves())
    check(taking_over())


def test_a_program_that_nothing_runs_is_allowed() -> None:
    check(with_program("other", evictor(due=False)))


def staged(*depths: int, whole: str | None = None, **more: ProgramEntry) -> Manifest:
    """Two stages of these depths, and a program that does both."""
    made = encoders("ab", a=program([X], [Y, DONE]), b=program([X], [Y]), **more)
    first, second = made.schedule.entries
    entries = (replace(first, depth=(*depths, 0, 0)[0]), replace(second, depth=(*depths, 0, 0)[1]))
    return replace(made, schedule=replace(made.schedule, entries=entries, whole=whole))


def one_row(entry: ProgramEntry) -> ProgramEntry:
    return replace(entry, ranges={**entry.ranges, "batch": Range(1, 1)})


def test_a_program_that_keeps_a_path_is_allowed() -> None:
    check(verified(KEEP))
    check(told())


def test_stages_with_depths_and_a_whole_are_allowed() -> None:
    depth = Tensor("left_after", "int64", ("batch",), "depth")
    check(staged(3, 12, whole="c", c=one_row(program([X], [Y, depth]))))


# ------------------------------------------------------------------------- ways to break a good description


def with_program(name: str, entry: ProgramEntry) -> Manifest:
    return replace(toy(), programs={**toy().programs, name: entry})


def with_input(program: str, tensor: str, /, **changes: Any) -> Manifest:
    entry = toy().programs[program]
    inputs = tuple(replace(t, **changes) if t.name == tensor else t for t in entry.inputs)
    return with_program(program, replace(entry, inputs=inputs))


def with_output(program: str, tensor: str, /, **changes: Any) -> Manifest:
    entry = toy().programs[program]
    outputs = tuple(replace(t, **changes) if t.name == tensor else t for t in entry.outputs)
    return with_program(program, replace(entry, outputs=outputs))


def without(name: str, side: str, tensor: str) -> Manifest:
    entry = toy().programs[name]
    kept = tuple(t for t in getattr(entry, side) if t.name != tensor)
    return with_program(name, replace(entry, **{side: kept}))


def with_aliases(name: str, **aliases: str) -> Manifest:
    return with_program(name, replace(toy().programs[name], aliases=aliases))


def with_state(state: str, /, **changes: Any) -> Manifest:
    return replace(toy(), states=tuple(replace(s, **changes) if s.name == state else s for s in toy().states))


def with_link(index: int, **changes: Any) -> Manifest:
    links = [replace(link, **changes) if i == index else link for i, link in enumerate(toy().links)]
    return replace(toy(), links=tuple(links))


def with_schedule(**changes: Any) -> Manifest:
    return replace(toy(), schedule=replace(toy().schedule, **changes))


def with_trigger(*arguments: Any) -> Manifest:
    return with_schedule(triggers=(Trigger(*arguments),))


def encoders(schedule: str, **programs: ProgramEntry) -> Manifest:
    """A model of nothing but programs that run once, in the order of ``schedule``."""
    return Manifest(programs, {}, Schedule(tuple(Entry(name, "encode") for name in schedule)))


def decoding(*programs: ProgramEntry) -> Manifest:
    """A model with so many programs that decode, with a tree for each that takes one."""
    made = choosing()
    named = {f"go_{i}": program for i, program in enumerate(programs)}
    entries = [
        Entry(name, "decode", 4, (-1, 0) if find_role(program.inputs, "parent") else ())
        for name, program in named.items()
    ]
    schedule = replace(made.schedule, entries=(made.schedule.entries[0], *entries))
    return replace(made, programs={"read": made.programs["read"], **named}, schedule=schedule)


def in_halves(**programs: ProgramEntry) -> Manifest:
    """A model of two programs in a call, with others in place of these."""
    made = halves()
    return replace(made, programs={**made.programs, **programs})


def from_token(*since: int, tree: tuple[int, ...] = ()) -> Manifest:
    """A model of programs that decode one after another, the last perhaps with a tree."""
    made = decoding(*[DRAWS] * (len(since) - 1), GUESSES if tree else DRAWS)
    first, *decodes = made.schedule.entries
    entries = (replace(entry, since=token) for entry, token in zip(decodes, since, strict=True))
    return replace(made, schedule=replace(made.schedule, entries=(first, *entries)))


DRAWS, GUESSES = choosing().programs["go"], choosing().programs["guess"]
REST = halves().programs["rest"]

PATH, KEEPS = (
    Tensor("path", "int64", ("batch", "nodes"), "path"),
    Tensor("keeps", "int64", ("batch",), "count"),
)
KEEP = program([PATH, KEEPS, reads("length")], [reads("length", new=True)])


def verified(keep: ProgramEntry | None, read: ProgramEntry | None = None) -> Manifest:
    """A model of one program that reads any mask, and of one that keeps a path of what it left."""
    programs = {"read": read or reader("rows", "mask", emits="logits"), **({"keep": keep} if keep else {})}
    entries = tuple(Entry("read", role, "n") for role in ("prefill", "decode"))
    states = tuple(state for state in STATES if state.name != "turns" or "turns" in str(keep))
    return Manifest(programs, {}, Schedule(entries, commit="keep"), states, (), Generation(64, VOCABULARY))


def told(source: str = "read", when: str = "call") -> Manifest:
    """One whose program that reads tells the one that keeps something of the call."""
    offset = Tensor("offset", "int64", ("batch", 1), "link")
    read = reader("rows", "mask", emits="logits")
    keep = replace(KEEP, inputs=(*KEEP.inputs, offset))
    made = verified(keep, replace(read, outputs=(*read.outputs, offset)))
    other = program([reads("length")], [offset])
    link = Link(Port(source, "offset"), Port("keep", "offset"), when)
    return replace(made, programs={**made.programs, "other": other}, links=(link,))


SURE = Tensor("sure", "int64", ("batch",), "confidence")
NEAR = Tensor("near", "int64", ("batch", 3, 2), "neighbours")

BROKEN: dict[str, tuple[Callable[[], Manifest], str]] = {
    # programs
    "no program": (lambda: replace(toy(), programs={}), "programs is empty"),
    "no outputs": (lambda: with_program("see", program([X], [])), "program 'see' has no outputs"),
    "confidence": (
        lambda: with_program(
            "read", replace(toy().programs["read"], outputs=(*toy().programs["read"].outputs, SURE))
        ),
        "program 'read' is confident of tokens to come and emits none",
    ),
    "neighbours": (
        lambda: with_program(
            "read", replace(toy().programs["read"], outputs=(*toy().programs["read"].outputs, NEAR))
        ),
        "program 'read' gives neighbours of other tokens than it reads",
    ),
    "confidence of one": (
        lambda: decoding(DRAWS, replace(GUESSES, outputs=(*GUESSES.outputs, SURE))),
        "'go_1' .* emits confidence, count, tokens, where the first has count, tokens",
    ),
    "two inputs": (
        lambda: with_input("read", "mask", name="rows"),
        "inputs of program 'read' has the name 'rows'",
    ),
    "two outputs": (
        lambda: with_output("see", "offset_1", name="offset_0"),
        "outputs of program 'see' has the name 'offset_0' twice",
    ),
    "no range": (
        lambda: with_input("see", "images", axes=("batch", "width")),
        "ranges of program 'see' lack the axis 'width' of input 'images'",
    ),
    "an output's role": (
        lambda: with_input("see", "images", role="logits"),
        "'images' of the inputs of program 'see' has the role 'logits', which is none of theirs",
    ),
    "a role twice": (
        lambda: with_input("read", "rows", role="mask"),
        "inputs of program 'read' have the role 'mask'",
    ),
    "a role's dtype": (
        lambda: with_input("read", "tokens", dtype="int32"),
        "'tokens'.*must be int64 .batch, n.",
    ),
    "a role's axes": (lambda: with_input("read", "rows", axes=("batch", 1)), "'rows'.*must be int64 .k."),
    "a role's batch": (lambda: with_input("go", "limit", axes=("n",)), "'limit'.*must be int64 .batch."),
    "a state's role": (
        lambda: with_input("read", "length", state=None),
        "the state null, which do not go together",
    ),
    "positions": (
        lambda: with_input("read", "positions", axes=("batch", 3)),
        "positions of program 'read' have not",
    ),
    "mask": (
        lambda: with_input("read", "mask", axes=("batch", "n", 3)),
        "mask of program 'read' have not the axes",
    ),
    "no count": (lambda: without("go", "outputs", "count"), "program 'go' must emit tokens and their count"),
    # aliases
    "alias of nothing": (lambda: with_aliases("go", next_history="gone"), "names 'gone', which is not there"),
    "nothing's alias": (
        lambda: with_aliases("go", gone="history"),
        "output 'gone' in program 'go' names 'gone'",
    ),
    "alias of another size": (
        lambda: with_aliases("go", next_history="length"),
        "another dtype or other axes than",
    ),
    "alias of no state": (lambda: with_aliases("go", count="limit"), "is input 'limit', which is no state"),
    "alias of another state": (
        lambda: with_aliases("evict", next_length="turns"),
        "is input 'turns', which is not the state 'length'",
    ),
    # states
    "two states": (lambda: with_state("turns", name="length"), "states has the name 'length' twice"),
    "kind": (lambda: with_state("turns", kind="cache"), "state 'turns' has the kind 'cache'"),
    "layer": (lambda: with_state("history", layer=-1), "state 'history' has the layer -1"),
    "two slot axes": (
        lambda: with_state("history", axes=("batch", "slots", "more")),
        "more named axes than the batch",
    ),
    "not finite": (lambda: with_state("turns", initial=float("inf")), "state 'turns' starts as inf"),
    "not whole": (lambda: with_state("turns", initial=0.5), "starts as 0.5, which 'int64' cannot represent"),
    "too large": (
        lambda: replace(toy(), states=(*STATES, State("a", "memory", "float16", ("batch",), 1e6))),
        "state 'a' starts as 1000000.0, which 'float16' cannot represent",
    ),
    "a length's axes": (
        lambda: with_state("length", axes=("batch", "slots")),
        "'length' counts slots and must be",
    ),
    "no occupancy": (
        lambda: with_state("history", occupancy=None),
        "state 'history' has slots without an occupancy",
    ),
    "no slots": (
        lambda: with_state("turns", occupancy=Occupancy("length")),
        "state 'turns' has an occupancy without an axis of slots",
    ),
    "occupancy of nothing": (
        lambda: with_state("history", occupancy=Occupancy("turns")),
        "names 'turns', which is no state of kind 'length'",
    ),
    "column": (
        lambda: with_state("history", occupancy=Occupancy("length", 0)),
        "has the column 0, which state 'length' lacks",
    ),
    "two occupancies": (
        lambda: replace(
            toy(),
            states=(
                *STATES,
                State("other", "length", "int64", ("batch",)),
                State("more", "memory", "int64", ("batch", "slots"), occupancy=Occupancy("other")),
            ),
        ),
        "state 'more' has another occupancy than other states with the axis 'slots'",
    ),
    "state of nobody": (
        lambda: replace(toy(), states=(*STATES, State("a", "memory", "int64", ("batch",)))),
        "state 'a' is wired to no program",
    ),
    "nobody's state": (
        lambda: with_input("evict", "turns", state="gone"),
        "names the state 'gone', which is not",
    ),
    "state of another size": (
        lambda: with_input("evict", "turns", dtype="int32"),
        "'turns' of program 'evict' has another dtype or other axes than the state 'turns'",
    ),
    "state twice": (
        lambda: with_program(
            "evict",
            program([reads("length"), replace(reads("length"), name="b")], [reads("length", new=True)]),
        ),
        "inputs of program 'evict' name the state 'length' twice",
    ),
    # links
    "source": (
        lambda: with_link(0, source=Port("see", "gone")),
        "'gone' of program 'see', which is not among the out",
    ),
    "target": (
        lambda: with_link(0, target=Port("gone", "a")),
        "'a' of program 'gone', which is not among the inputs",
    ),
    "when": (lambda: with_link(0, when="often"), "has when 'often', not once or call"),
    "source's role": (
        lambda: with_link(0, source=Port("go", "count")),
        "comes from 'count' of program 'go', whose role",
    ),
    "target's role": (
        lambda: with_link(0, target=Port("read", "rows")),
        "leads to 'rows' of program 'read', whose role",
    ),
    "ends": (
        lambda: with_output("see", "offset_0", dtype="int32"),
        "needs one dtype and the same axes on both ends",
    ),
    "no batch": (
        lambda: replace(
            with_output("see", "offset_0", axes=(3,)),
            programs={
                **with_output("see", "offset_0", axes=(3,)).programs,
                "read": with_input("read", "offset_0", axes=(3,)).programs["read"],
            },
        ),
        "with the batch in front",
    ),
    "two links": (lambda: replace(toy(), links=(*toy().links, toy().links[0])), "has more than one link"),
    "no link": (
        lambda: replace(toy(), links=toy().links[:1]),
        "'offset_0' of program 'go' has the role 'link' and no",
    ),
    "link of a decode": (
        lambda: with_link(1, when="once"),
        "runs more than once per request, so it must be 'call'",
    ),
    "too late": (
        lambda: with_schedule(entries=toy().schedule.entries[1:]),
        "comes from 'offset_0' of program 'see', which does not run before it",
    ),
    # schedule
    "no entry": (lambda: encoders("", a=program([X], [Y])), "the schedule has no entry"),
    "entry's role": (
        lambda: with_schedule(entries=(*toy().schedule.entries, Entry("evict", "draft"))),
        "has the role 'draft'",
    ),
    "entry of nothing": (
        lambda: with_schedule(entries=(*toy().schedule.entries, Entry("gone", "decode"))),
        "the schedule names the program 'gone', which is not there",
    ),
    "order": (
        lambda: with_schedule(entries=(*toy().schedule.entries, Entry("see", "encode"))),
        "entries are not in the order of their roles",
    ),
    "twice": (
        lambda: with_schedule(entries=(Entry("see", "encode"), *toy().schedule.entries)),
        "the schedule runs 'see as encode' twice",
    ),
    "two decodes": (
        lambda: replace(
            with_program("other", reader(emits="logits", count=1)),
            schedule=replace(toy().schedule, entries=(*toy().schedule.entries, Entry("other", "decode", 1))),
        ),
        "'other' is a further one that decodes, and only one may be, with a tree where the first has none",
    ),
    "trees alone": (
        lambda: decoding(GUESSES, GUESSES),
        "'go_1' is a further one that decodes, and only one may be",
    ),
    "three decodes": (
        lambda: decoding(DRAWS, GUESSES, GUESSES),
        "'go_2' is a further one that decodes, and only one may be",
    ),
    "decodes that are told other things": (
        lambda: decoding(DRAWS, reader("limit", "parent", "seed", emits="tokens", count=1)),
        "'go_1' .* is given limit, positions, seed, tokens, where the first has limit, positions, tokens",
    ),
    "decodes that emit other things": (
        lambda: decoding(reader("limit", emits="logits", count=1), GUESSES),
        "'go_1' .* emits count, tokens, where the first has logits",
    ),
    "decodes with other states": (
        lambda: decoding(DRAWS, replace(GUESSES, outputs=GUESSES.outputs[:-1], aliases={})),
        "'go_1' .* leaves the states history as they were, which the first changes",
    ),
    "further programs of what encodes": (
        lambda: replace(encoders("a", a=encoder()), schedule=Schedule((Entry("a", "encode", then=("b",)),))),
        "names the program 'b', which is not there",
    ),
    "an encoder in parts": (
        lambda: replace(
            encoders("a", a=encoder(), b=encoder()), schedule=Schedule((Entry("a", "encode", then=("b",)),))
        ),
        "'a' encodes and has further programs; make each an entry",
    ),
    "a first part that emits": (
        lambda: in_halves(half=replace(half(), outputs=(*half().outputs, REST.outputs[0]))),
        "'half' runs as prefill and has 'logits' of the role 'logits', which means nothing there",
    ),
    "a last part that emits nothing": (
        lambda: in_halves(rest=replace(REST, outputs=REST.outputs[1:])),
        "'rest' runs as prefill and must emit either logits or tokens with their count",
    ),
    "a part of other tokens": (
        lambda: in_halves(rest=reader("rows", emits="logits", links=1, count="m")),
        "the tokens of program 'rest' have not the axis 'n' of the first program's tokens",
    ),
    "a part of other numbers of tokens": (
        lambda: in_halves(rest=replace(REST, ranges={**REST.ranges, "n": Range(1, 9)})),
        "'rest' takes other numbers of tokens than the first program of its call",
    ),
    "a first entry that takes over": (
        lambda: from_token(2, 3),
        "first entry of the schedule that decodes takes over later than with the first token",
    ),
    "a later entry that takes over no later": (
        lambda: from_token(0, 3, 3),
        "'go_2' is a further one that decodes, and .*takes over after more tokens than the one before it",
    ),
    "a tree that takes over": (
        lambda: from_token(0, 3, tree=(-1, 0)),
        "'go_1' .*takes over, and one has a tree",
    ),
    "a prompt that takes over": (
        lambda: with_schedule(entries=tuple(replace(e, since=2) for e in toy().schedule.entries)),
        "'see' takes over after 2 tokens and does not decode",
    ),
    "a link within a call once": (
        lambda: replace(halves(), links=(replace(halves().links[0], when="once"),)),
        "runs more than once per request, so it must be 'call'",
    ),
    "no generation": (
        lambda: replace(toy(), generation=None),
        "has 1 entries of role 'prefill', it must",
    ),
    "no decode": (
        lambda: with_schedule(entries=toy().schedule.entries[:2]),
        "has 0 entries of role 'decode'",
    ),
    "triggers of an encoder": (
        lambda: replace(
            encoders("a", a=encoder()), schedule=Schedule((Entry("a", "encode"),), (Trigger("a", "prefill"),))
        ),
        "has triggers or is endless, and nothing generates",
    ),
    "caller's input in a decode": (
        lambda: with_program(
            "go",
            replace(
                toy().programs["go"],
                inputs=(*toy().programs["go"].inputs, X),
            ),
        ),
        "program 'go' runs as decode and has 'x' of the role 'input', which means nothing there",
    ),
    "tokens in an encoder": (
        lambda: encoders("a", a=program([Tensor("t", "int64", ("batch", "n"), "tokens")], [Y])),
        "program 'a' runs as encode and has 't' of the role 'tokens'",
    ),
    "slots": (
        lambda: with_schedule(entries=(*toy().schedule.entries[:2], Entry("go", "decode", "slots"))),
        "program 'go' needs 'slots' slots, which is neither",
    ),
    "fewer than no slots": (
        lambda: with_schedule(entries=(*toy().schedule.entries[:2], Entry("go", "decode", -1))),
        "program 'go' needs -1 slots",
    ),
    "emits nothing": (
        lambda: without("read", "outputs", "logits"),
        "'read' .* must emit either logits or tokens",
    ),
    "vocabulary": (
        lambda: with_output("read", "logits", axes=("batch", "k", VOCABULARY + 1)),
        "emits logits of another vocabulary than the 11",
    ),
    "no positions": (
        lambda: without("read", "inputs", "positions"),
        "needs inputs of the roles 'tokens' and",
    ),
    "no limit": (
        lambda: with_program("read", reader(emits="tokens", links=1)),
        "emits tokens and has no input of the role 'limit'",
    ),
    "many tokens": (
        lambda: with_program("go", reader(emits="logits", links=1, count=3)),
        "program 'go' runs as decode and takes 3 tokens in every call",
    ),
    "shared input": (
        lambda: encoders(
            "ab",
            a=program([X], [Y]),
            b=program([replace(X, dtype="int64")], [replace(Y, name="z")]),
        ),
        "input 'x' of program 'b' has another dtype or other axes than in a program before it",
    ),
    "shared output": (
        lambda: encoders("ab", a=program([X], [Y]), b=program([X], [Y])),
        "two programs give the caller an output 'y'",
    ),
    # exits
    "nothing after": (
        lambda: encoders("ab", a=program([X], [Y, DONE]), b=program([X], [Y, DONE])),
        "program 'b' has an output 'done' and no program runs after it",
    ),
    "other outputs": (
        lambda: encoders("ab", a=program([X], [replace(Y, dtype="float16"), DONE]), b=program([X], [Y])),
        "rows leave after program 'a', which has not the outputs of 'b'",
    ),
    "outputs of some": (
        lambda: encoders(
            "abc", a=program([X], [Y, DONE]), b=program([X], [replace(Y, name="z")]), c=program([X], [Y])
        ),
        "program 'b' gives outputs for the rows alone that did not leave",
    ),
    "rows without a place": (
        lambda: encoders(
            "ab", a=program([X], [replace(Y, axes=(1,)), DONE]), b=program([X], [replace(Y, axes=(1,))])
        ),
        "have no batch in front, by which rows that left earlier are put back",
    ),
    "exits of a text": (
        lambda: with_program(
            "see", replace(toy().programs["see"], outputs=(*toy().programs["see"].outputs, DONE))
        ),
        "rows leave after program 'see', though the model generates",
    ),
    "depth that falls": (
        lambda: staged(3, 2),
        "the depths .3, 2. of the schedule's entries do not grow",
    ),
    "depth twice": (lambda: staged(2, 2), "the depths .2, 2. of the schedule's entries do not grow"),
    "depth below nothing": (lambda: staged(-1, 2), "has a depth below 0, or has one and does not encode"),
    "depth of a text": (
        lambda: with_schedule(
            entries=(*toy().schedule.entries[:-1], replace(toy().schedule.entries[-1], depth=3))
        ),
        "has a depth below 0, or has one and does not encode",
    ),
    "depth of one": (lambda: staged(0, 2), "some of the entries after which rows leave have a depth"),
    "depth of the other": (lambda: staged(2, 0), "some of the entries after which rows leave have a depth"),
    # the whole
    "whole that is gone": (
        lambda: staged(whole="gone"),
        "the whole of the schedule, program 'gone', is not there",
    ),
    "whole that runs": (lambda: staged(whole="b"), "program 'b', is run by an entry"),
    "whole of what generates": (
        lambda: replace(verified(KEEP), schedule=replace(verified(KEEP).schedule, whole="keep")),
        "program 'keep', encodes, and the model generates",
    ),
    "whole of links": (
        lambda: staged(whole="c", c=program([replace(X, role="link")], [Y])),
        "the link|role 'link'",
    ),
    "whole that decides": (
        lambda: staged(whole="c", c=program([X], [Y, DONE])),
        "program 'c', has 'done' of the role 'done'",
    ),
    "whole of other outputs": (
        lambda: staged(whole="c", c=one_row(program([X], [replace(Y, dtype="float16")]))),
        "program 'c', has not the inputs and outputs of the entries",
    ),
    "whole of other inputs": (
        lambda: staged(whole="c", c=one_row(program([replace(X, name="z")], [Y]))),
        "program 'c', has not the inputs and outputs of the entries",
    ),
    "whole of many rows": (
        lambda: staged(whole="c", c=program([X], [Y])),
        "program 'c', takes other batches than one row",
    ),
    # the commit
    "commit that is gone": (
        lambda: verified(None),
        "the commit of the schedule, program 'keep', is not there",
    ),
    "commit that runs": (
        lambda: replace(halves(), schedule=replace(halves().schedule, commit="rest")),
        "program 'rest', is run by an entry",
    ),
    "commit of an encoder": (
        lambda: replace(
            staged(3, 12, c=one_row(program([X], [Y]))),
            schedule=replace(staged(3, 12).schedule, commit="c"),
        ),
        "program 'c', keeps what nothing reads: the model does not generate",
    ),
    "commit that reads": (
        lambda: verified(program([PATH, KEEPS, X, reads("length")], [reads("length", new=True)])),
        "program 'keep', has 'x' of the role 'input', which means nothing there",
    ),
    "commit of no path": (
        lambda: verified(program([KEEPS, reads("length")], [reads("length", new=True)])),
        "program 'keep', has no inputs of the roles 'path' and 'count'",
    ),
    "commit of one path for all": (
        lambda: verified(program([replace(PATH, axes=("nodes",)), KEEPS], [reads("length", new=True)])),
        r"has the role 'path' and must be int64 \[batch, n\]",
    ),
    "commit of tokens": (
        lambda: replace(
            choosing(),
            programs={**choosing().programs, "keep": KEEP},
            schedule=replace(choosing().schedule, commit="keep"),
        ),
        "program 'keep', keeps what several programs leave, or one that draws its tokens",
    ),
    "commit without a mask": (
        lambda: verified(KEEP, reader("rows", emits="logits")),
        "keeps what program 'read' leaves, which takes no mask of any number of tokens",
    ),
    "commit told of another call": (lambda: told("other"), "must be 'call', and come from the program that"),
    "commit told once": (lambda: told(when="once"), "must be 'call', and come from the program that decodes"),
    "commit of other states": (
        lambda: verified(program([PATH, KEEPS, reads("turns")], [reads("turns", new=True)])),
        "changes the states turns, which the program that decodes does not",
    ),
    # triggers
    "trigger of nothing": (
        lambda: with_trigger("gone", "prefill"),
        "runs program 'gone', which is not there",
    ),
    "trigger that reads": (
        lambda: with_trigger("go", "prefill"),
        "which has 'tokens' of the role 'tokens'",
    ),
    "trigger after": (
        lambda: with_trigger("evict", "lunch"),
        "comes after 'lunch', it must be one of prefill, tokens",
    ),
    "never": (lambda: with_trigger("evict", "tokens"), "comes every 0 tokens after 'tokens'"),
    "counting nothing": (lambda: with_trigger("evict", "prefill", 3), "comes every 3 tokens after 'prefill'"),
    "within the prompt": (
        lambda: with_trigger("evict", "prefill", 0, True),
        "comes within the prompt, but not after tokens",
    ),
    "rows that differ": (
        lambda: with_program("evict", evictor(due=False)),
        "takes no 'due', though the rows advance by different numbers",
    ),
    "endless-late": (
        lambda: with_schedule(triggers=(Trigger("evict", "tokens", 65),), endless=True),
        "no trigger runs before the context is full",
    ),
    "endless": (
        lambda: with_schedule(triggers=(Trigger("evict", "prefill"),), endless=True),
        "endless and no trigger runs after tokens",
    ),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_law_is_named(make: Callable[[], Manifest], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        check(make())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_chain_of_writes_shares_one_buffer() -> None:
    """Several outputs may be one input."""
    go = toy().programs["go"]
    middle = Tensor("middle", "int64", ("batch", "slots"), "link")
    check(
        with_program(
            "go", replace(go, outputs=(*go.outputs, middle), aliases={**go.aliases, "middle": "history"})
        )
    )


def test_a_link_may_be_of_what_the_caller_gets() -> None:
    a, b = encoder(links=1, output=True), encoder(given=1)
    made = encoders("ab", a=a, b=replace(b, outputs=(replace(b.outputs[0], name="z"),)))
    check(replace(made, links=(Link(Port("a", "total"), Port("b", "given_0")),)))
