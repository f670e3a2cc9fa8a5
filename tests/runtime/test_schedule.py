"""The loop: what a schedule says is what runs, for rows that advance on their own, until every text ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from tests import node
from tests.runtime.artifacts import graph, write
from tests.runtime.toys import (
    DRAWN,
    KEPT,
    STATES,
    VOCABULARY,
    Graph,
    choosing,
    encoder,
    evictor,
    half,
    halves,
    program,
    reader,
    save,
    taken_over,
    taking_over,
    text,
    toy,
)
from tokopt.errors import InputError, TokoptError
from tokopt.runtime import LanguageModel, Sampling, load, loop
from tokopt.runtime.format.checks import FormatError, check_format
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.manifest import Manifest, ProgramEntry
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger
from tokopt.runtime.format.signature import Range, Tensor, find_role
from tokopt.runtime.format.state import Occupancy, State

PROMPTS = [[1, 2, 3], [4], [7, 7]]
IMAGES = np.array([[1, 2], [2, 3], [4, 0]], np.float32)
OFFSETS = [3, 5, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(save(tmp_path_factory.mktemp("toy") / "toy.tokopt", toy()), threads=1)


def opened(folder: Path, manifest: Manifest) -> LanguageModel:
    return load(save(folder / "toy.tokopt", manifest), threads=1)


def recorded(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[loop.Request]:
    """The requests that a model will make."""
    requests: list[loop.Request] = []
    original = model._request

    def record(*arguments: Any) -> loop.Request:
        requests.append(original(*arguments))
        return requests[-1]

    monkeypatch.setattr(model, "_request", record)
    return requests


def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every call that will be made: the entry's role, and the tokens that are read."""
    calls: list[tuple[str, int]] = []
    original = loop.Request.emit

    def record(request: loop.Request, entry: Entry, tokens: np.ndarray, *rest: Any) -> loop.Emission:
        calls.append((entry.role, tokens.shape[1]))
        return original(request, entry, tokens, *rest)

    monkeypatch.setattr(loop.Request, "emit", record)
    return calls


# ---------------------------------------------------------------------------------- rows and their tokens


def test_what_one_program_makes_reaches_two_others(model: LanguageModel) -> None:
    got = model.generate(PROMPTS, max_tokens=20, inputs={"images": IMAGES})
    expected = [text(ids, offset, 20) for ids, offset in zip(PROMPTS, OFFSETS, strict=True)]
    assert [list(row.tokens) for row in got] == expected
    assert {row.finish for row in got} == {"length"}


def test_rows_advance_on_their_own(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is evicted after 5 tokens of its own, and its cache has the last that it read."""
    requests = recorded(model, monkeypatch)
    got = model.generate(PROMPTS, max_tokens=20, inputs={"images": IMAGES})
    buffers = requests[0].buffers
    assert (
        buffers.read("turns").tolist() == [1 + 19 // 5] * 3
    )  # after the prompt; the first token is the host's
    for row, ids in enumerate(PROMPTS):
        length = int(buffers.read("length")[row])
        whole = [*ids, *got[row].tokens]
        assert length >= KEPT and buffers.read("history")[row, :length].tolist() == whole[:-1][-length:]


def test_a_batch_equals_one_by_one(model: LanguageModel) -> None:
    together = model.generate(PROMPTS, max_tokens=13, inputs={"images": IMAGES})
    for i, ids in enumerate(PROMPTS):
        assert model.generate(ids, max_tokens=13, inputs={"images": IMAGES[i : i + 1]}) == together[i]


@pytest.mark.parametrize("count", range(1, 9))
def test_texts_are_cut_at_their_length(model: LanguageModel, count: int) -> None:
    got = model.generate(PROMPTS, max_tokens=count, inputs={"images": IMAGES})
    assert [len(row.tokens) for row in got] == [count] * 3


def test_tokens_come_one_by_one(model: LanguageModel) -> None:
    found = list(model.tokens(PROMPTS[0], max_tokens=9, inputs={"images": IMAGES[:1]}))
    assert found == text(PROMPTS[0], 3, 9)


def test_a_stop_token_within_a_call_ends_its_row_alone(tmp_path: Path) -> None:
    stopping = opened(tmp_path, replace(toy(), generation=Generation(64, VOCABULARY, eos=(1,))))
    got = stopping.generate(PROMPTS, max_tokens=12, inputs={"images": IMAGES})
    for row, ids, offset in zip(got, PROMPTS, OFFSETS, strict=True):
        whole = text(ids, offset, 12)
        expected = whole[: whole.index(1) + 1] if 1 in whole else whole
        assert list(row.tokens) == expected and row.finish == ("stop" if 1 in whole else "length")


def test_a_text_ends_at_the_context(tmp_path: Path) -> None:
    short = opened(tmp_path, replace(toy(), generation=Generation(8, VOCABULARY)))
    got = short.generate(PROMPTS, max_tokens=50, inputs={"images": IMAGES})
    assert [len(row.tokens) for row in got] == [5, 7, 6]


# ------------------------------------------------------------------------------- several that decode


def test_a_call_runs_what_fits_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single node the program that takes no tree; each goes on from what the other left, in any order."""
    both = opened(tmp_path, choosing())
    assert both.nodes == 3
    ran: list[tuple[str, tuple[int, ...]]] = []
    original = loop.Request.emit

    def record(request: loop.Request, entry: Entry, *rest: Any) -> loop.Emission:
        ran.append((entry.program, entry.tree))
        return original(request, entry, *rest)

    monkeypatch.setattr(loop.Request, "emit", record)
    request = both.open(1, 1)
    made, got = request.prefill([[1, 2]], np.array([1])), list[int]()
    for nodes in (1, 3, 1, 1, 2, None, 1) * 9:
        assert made.tokens is not None and made.count is not None
        got += made.tokens[0, : made.count[0]].tolist()
        made = request.step(np.array([got[-1:]]), np.array([[len(got)]]), limit=np.array([9]), nodes=nodes)
    wanted = [
        ("go", ()),
        ("guess", (-1, 0, 1)),
        ("go", ()),
        ("go", ()),
        ("guess", (-1, 0)),
        ("guess", (-1, 0, 1)),
    ]
    assert ran[1:] == [*wanted, ("go", ())] * 9
    assert got == text([2], 1, len(got))
    length = int(request.buffers.read("length")[0])
    assert length > loop.BLOCK  # the buffers grew
    assert request.buffers.read("history")[0, : len(got) + 1].tolist() == [1, 2, *got[:-1]]


def test_the_programs_of_a_call_hand_on_what_they_make(tmp_path: Path) -> None:
    """Each call's own value goes over the link, for every row; the last program emits."""
    made = opened(tmp_path, halves())
    got = made.generate(PROMPTS, max_tokens=40)
    for ids, row in zip(PROMPTS, got, strict=True):
        wanted = [ids[-1]]
        for _ in range(40):
            wanted.append((wanted[-1] + 1 + wanted[-1] % 3) % VOCABULARY)
        assert list(row.tokens) == wanted[1:]
    assert made.generate(PROMPTS[0], max_tokens=40) == got[0]


def test_a_program_takes_over_after_so_many_tokens(tmp_path: Path) -> None:
    """All rows of a batch at once, in both hosts; a prompt begins anew."""
    made = opened(tmp_path, taking_over())
    got = made.generate(PROMPTS, max_tokens=30)
    assert [list(row.tokens) for row in got] == [taken_over(ids, 30) for ids in PROMPTS]
    assert node.generate(made.path, PROMPTS[0], 30) == taken_over(PROMPTS[0], 30)
    request = made.open(1, 1)
    request.prefill([PROMPTS[0]])
    for _ in range(5):
        request.step(np.array([[2]]), np.array([[3]]))
    emission = request.step(np.array([[2]]), np.array([[3]]))
    assert emission.logits is not None and int(emission.logits.argmax()) == 5
    request.step(np.array([[2, 2]]), np.array([[4, 5]]), role="prefill")
    emission = request.step(np.array([[2]]), np.array([[3]]))
    assert emission.logits is not None and int(emission.logits.argmax()) == 3


@pytest.mark.parametrize(("nodes", "program"), [(1, "go"), (3, "guess")])
def test_a_text_has_the_nodes_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, program: str
) -> None:
    both, ran = opened(tmp_path, choosing()), list[str]()
    original = loop.Request.emit

    def record(request: loop.Request, entry: Entry, *rest: Any) -> loop.Emission:
        ran.append(entry.program)
        return original(request, entry, *rest)

    monkeypatch.setattr(loop.Request, "emit", record)
    assert list(both.generate([1, 2], max_tokens=9, nodes=nodes).tokens) == text([2], 1, 9)
    assert set(ran) == {"read", program}


# ---------------------------------------------------------------------------------------------- prompts


def test_a_link_once_lets_the_prompt_be_read_at_once(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PREFILL", 2)
    reads = recorded_reads(monkeypatch)
    whole = model.generate(PROMPTS[0], max_tokens=1, inputs={"images": IMAGES[:1]})
    assert reads == [("prefill", 3)]
    links = tuple(replace(link, when="call") for link in toy().links)
    again = opened(tmp_path, replace(toy(), links=links))
    assert again.generate(PROMPTS[0], max_tokens=1, inputs={"images": IMAGES[:1]}) == whole
    assert reads[1:] == [("prefill", 2), ("prefill", 1)]


def test_a_prompt_that_does_not_fit_into_one_call_is_refused(tmp_path: Path) -> None:
    longer = opened(tmp_path, replace(toy(), generation=Generation(100, VOCABULARY)))
    with pytest.raises(InputError, match="has 65 tokens and is read at once, 64 at most"):
        longer.generate([1] * 65, max_tokens=1, inputs={"images": IMAGES[:1]})


def evicting(due: bool = False, **more: Any) -> Manifest:
    """One program that reads, and one that evicts every 5 tokens."""
    step = reader("rows", emits="logits")
    schedule = Schedule(
        (Entry("step", "prefill", "n"), Entry("step", "decode", "n")),
        (Trigger("evict", "tokens", 5, **more),),
    )
    programs = {"step": step, "evict": evictor(due=due)}
    return Manifest(programs, {}, schedule, STATES, generation=Generation(64, VOCABULARY))


def test_a_trigger_within_the_prompt_divides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = opened(tmp_path, evicting(prompt=True))
    reads, requests = recorded_reads(monkeypatch), recorded(bounded, monkeypatch)
    got = bounded.generate([1] * 12, max_tokens=5)
    assert [size for role, size in reads if role == "prefill"] == [5, 5, 2]
    assert requests[0].buffers.read("turns").tolist() == [3]  # 12 tokens of the prompt, and 4 that were read
    assert list(got.tokens) == text([1], 1, 5)


def test_a_trigger_within_prompts_comes_to_each_row_after_its_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is none: a row of a batch has its turns as it has them alone."""
    bounded = opened(tmp_path, evicting(due=True, prompt=True))
    reads, requests = recorded_reads(monkeypatch), recorded(bounded, monkeypatch)
    prompts = [[1] * size for size in (12, 9, 4)]
    bounded.generate(prompts, max_tokens=5)
    assert [size for role, size in reads if role == "prefill"] == [5, 3, 2, 2]
    for prompt in prompts:
        bounded.generate(prompt, max_tokens=5)
    together, *alone = (request.buffers.read("turns").tolist() for request in requests)
    assert together == [turns for (turns,) in alone] == [3, 2, 1]


def test_an_endless_text_outgrows_the_context(tmp_path: Path) -> None:
    made = evicting(prompt=True)
    endless = opened(tmp_path, replace(made, schedule=replace(made.schedule, endless=True)))
    got = endless.generate([1] * 70, max_tokens=90)
    assert list(got.tokens) == text([1], 1, 90)
    assert got.statistics.cache_slots <= loop.BLOCK


def test_a_program_of_a_fixed_number_of_tokens_gets_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "read": reader("mask", "rows", emits="logits", count=4),
        "step": reader("rows", emits="logits", count=1),
    }
    schedule = Schedule((Entry("read", "prefill", 4), Entry("step", "decode", 1)))
    facts = Generation(64, VOCABULARY)
    fixed = opened(tmp_path, Manifest(programs, {}, schedule, STATES[:2], generation=facts))
    reads = recorded_reads(monkeypatch)
    assert list(fixed.generate([1, 2, 3, 4, 5, 6], max_tokens=5).tokens) == text([6], 1, 5)
    assert reads == [("prefill", 4)] * 2 + [("decode", 1)] * 4


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "input 'images' is missing"),
        ({"inputs": {"images": IMAGES[:2]}}, "the inputs have 2 rows and there are 3 prompts"),
        ({"inputs": {"image": IMAGES}}, "there is no input 'image'"),
        ({"inputs": {"images": IMAGES}, "sampling": Sampling(1.0)}, "draws its tokens itself"),
        (
            {"inputs": {"images": IMAGES}, "processors": [lambda history, logits: logits]},
            "draws its tokens itself",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model: LanguageModel, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(PROMPTS, **more)


def test_a_model_that_draws_has_no_scores(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="draws its tokens itself and gives no probabilities"):
        model.score([1, 2, 3])


def test_a_model_without_inputs_takes_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no input 'images'; the program takes none"):
        opened(tmp_path, evicting()).generate([1], inputs={"images": IMAGES[:1]})


def test_a_call_that_commits_nothing_is_an_error(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the text would never end."""
    original = loop.Request._call

    def stuck(request: loop.Request, name: str, values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        results = original(request, name, values)
        return results if name != "go" else {**results, "count": np.zeros(1, np.int64)}

    monkeypatch.setattr(loop.Request, "_call", stuck)
    with pytest.raises(TokoptError, match="program 'go' committed 0 of 4 tokens in row 0"):
        model.generate([1], inputs={"images": IMAGES[:1]})


# ----------------------------------------------------------------------------------------------- stages


X = Tensor("x", "float32", ("batch", 2), "input")
Y, DONE = Tensor("y", "float32", ("batch", 1), "output"), Tensor("done", "bool", ("batch",), "done")
CARRIED = Tensor("carried", "float32", ("batch", 2), "link")
DEPTHS = (2, 5, 6)


def stages() -> tuple[Manifest, dict[str, bytes]]:
    """``y`` is 1, 2 or 3 times the first column of ``x``, by the stage in which a row leaves: its second column."""
    files: dict[str, bytes] = {}
    programs: dict[str, ProgramEntry] = {}
    for i, name in enumerate(("a", "b", "c")):
        given = replace(CARRIED, name="given")
        inputs = [X] if i == 0 else [given, X] if i == 1 else [given]
        outputs = [Y, CARRIED, DONE] if i < 2 else [Y]
        programs[name] = replace(program(inputs, outputs), files={"onnx": f"{name}.onnx"})
        g, source = Graph(), X.name if i == 0 else given.name
        g.constants["factor"] = np.array([[i + 1.0]], np.float32)
        g.constants["stage"] = np.array(i, np.float32)
        first = g.op("Slice", source, g.const([0]), g.const([1]), g.const([1]))
        g.give(Y, g.op("Mul", first, "factor"))
        if i < 2:
            second = g.op("Slice", X.name, g.const([1]), g.const([2]), g.const([1]))
            g.give(DONE, g.op("Squeeze", g.op("Equal", second, "stage"), g.const([1])))
            g.give(CARRIED, source)
        taken, made = ({t.name: (_kind(t), list(t.axes)) for t in side} for side in (inputs, outputs))
        files[f"{name}.onnx"] = graph(g.nodes, taken, made, g.constants)
    ports = [Link(Port(a, "carried"), Port(b, "given")) for a, b in (("a", "b"), ("b", "c"))]
    entries = (Entry(name, "encode", depth=depth) for name, depth in zip(programs, DEPTHS, strict=True))
    return Manifest(programs, {}, Schedule(tuple(entries)), links=tuple(ports)), files


def _kind(tensor: Tensor) -> int:
    return TensorProto.BOOL if tensor.dtype == "bool" else TensorProto.FLOAT


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    manifest, files = stages()
    return load(
        write(tmp_path_factory.mktemp("stages") / "stages.tokopt", asdict(manifest), files), threads=1
    )


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7))
@settings(deadline=None)
def test_rows_leave_where_they_are_done(staged: Any, leaves: list[int]) -> None:
    x = np.stack([np.arange(len(leaves)), leaves], axis=1).astype(np.float32)
    np.testing.assert_array_equal(staged(x), x[:, :1] * (1 + x[:, 1:]))
    np.testing.assert_array_equal(staged.run(x).depths, [DEPTHS[leave] for leave in leaves])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.sampled_from(DEPTHS))
@settings(deadline=None)
def test_at_a_fixed_depth_all_rows_leave(staged: Any, leaves: list[int], depth: int) -> None:
    x = np.stack([np.arange(len(leaves)), leaves], axis=1).astype(np.float32)
    np.testing.assert_array_equal(staged(x, depth=depth), x[:, :1] * (1 + DEPTHS.index(depth)))
    assert set(staged.run(x, depth=np.int64(depth)).depths) == {depth}


@pytest.mark.parametrize("depth", [0, 1, 7, -1, True, "5", 2.0])
def test_a_depth_without_an_exit_is_refused(staged: Any, depth: Any) -> None:
    with pytest.raises(InputError, match="none at which rows may leave; choose among 2, 5, 6"):
        staged(np.zeros((1, 2), np.float32), depth=depth)


def test_a_program_that_nobody_needs_is_not_run(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    original = staged.sessions.run
    monkeypatch.setattr(staged.sessions, "run", lambda name, feed: ran.append(name) or original(name, feed))
    staged(np.zeros((3, 2), np.float32))
    assert ran == ["a"]


def test_states_of_the_rows_that_go_on(tmp_path: Path) -> None:
    """The first program writes 10 times the first column of ``x`` into a state, which the second gives the caller."""
    held = State("held", "memory", "float32", ("batch", 1), initial=5)
    given, made = (Tensor(name, held.dtype, held.axes, "state", "held") for name in ("held", "next_held"))
    first, second = program([X, given], [Y, DONE, made]), program([X, given], [Y])
    g, last = Graph(), Graph()
    g.constants["ten"], g.constants["five"] = np.array(10, np.float32), np.array(5, np.float32)
    column = g.op("Slice", X.name, g.const([0]), g.const([1]), g.const([1]))
    leaving = g.op("Slice", X.name, g.const([1]), g.const([2]), g.const([1]))
    g.give(Y, column)
    g.give(DONE, g.op("Squeeze", g.op("Cast", leaving, to=TensorProto.BOOL), g.const([1])))
    g.give(made, g.op("Add", g.op("Mul", column, "ten"), g.op("Sub", given.name, "five")))
    last.give(Y, given.name)
    programs, files = {}, {}
    for name, entry, nodes in (("a", first, g), ("b", second, last)):
        taken, returned = (
            {t.name: (_kind(t), list(t.axes)) for t in s} for s in (entry.inputs, entry.outputs)
        )
        files[f"{name}.onnx"] = graph(nodes.nodes, taken, returned, nodes.constants)
        programs[name] = replace(entry, files={"onnx": f"{name}.onnx"})
    schedule = Schedule((Entry("a", "encode"), Entry("b", "encode")))
    manifest = Manifest(programs, {}, schedule, (held,))
    kept = load(write(tmp_path / "kept.tokopt", asdict(manifest), files), threads=1)
    x = np.array([[1, 0], [2, 1], [3, 0], [4, 0], [5, 1]], np.float32)
    np.testing.assert_array_equal(kept(x)[:, 0], [10, 2, 30, 40, 5])
    assert kept.run(x).depths is None
    with pytest.raises(InputError, match="depth=1 means nothing to a model without exits"):
        kept(x, depth=1)


def test_a_state_that_is_written_once_is_read_in_every_call(tmp_path: Path) -> None:
    """As an encoder's keys and values are: how many slots it has follows from what the caller gives."""
    count = State("count", "length", "int64", ("batch",))
    memory = State(
        "memory", "memory", "int64", ("batch", "source"), initial=100, occupancy=Occupancy("count")
    )
    states = {"count": count, "memory": memory}
    reads = {n: Tensor(n, "int64", s.axes, "state", n) for n, s in states.items()}
    writes = {n: Tensor(f"next_{n}", "int64", s.axes, "state", n) for n, s in states.items()}
    see = program([Tensor("given", "int64", ("batch", "m"), "input")], list(writes.values()))
    plain = reader(emits="logits")
    step = replace(
        plain,
        inputs=(*plain.inputs[:2], *reads.values()),
        outputs=plain.outputs[:1],
        ranges={**plain.ranges, "source": Range()},
        aliases={},
    )
    g, h = Graph(), Graph()
    g.give(writes["memory"], "given")
    size = g.op("Shape", "given", start=1, end=2)
    g.give(writes["count"], g.op("Expand", size, g.op("Shape", "given", start=0, end=1)))
    source = h.op("Squeeze", h.op("Shape", "memory", start=1, end=2))
    inside = h.op(
        "Less", h.op("Range", h.const(0), source, h.const(1)), h.op("Unsqueeze", "count", h.const([1]))
    )
    summed = h.op("ReduceSum", h.op("Where", inside, "memory", h.const(0)), h.const([1]), keepdims=1)
    following = h.op("Mod", h.op("Add", "tokens", summed), h.const(VOCABULARY))
    h.constants["values"] = np.array([0, 1], np.float32)
    h.give(step.outputs[0], h.op("OneHot", following, h.const(VOCABULARY), "values"))
    programs, files = {}, {}
    for name, entry, nodes in (("see", see, g), ("step", step, h)):
        taken, returned = (
            {
                t.name: (TensorProto.INT64 if t.dtype == "int64" else TensorProto.FLOAT, list(t.axes))
                for t in side
            }
            for side in (entry.inputs, entry.outputs)
        )
        files[f"{name}.onnx"] = graph(nodes.nodes, taken, returned, nodes.constants)
        programs[name] = replace(entry, files={"onnx": f"{name}.onnx"})
    schedule = Schedule((Entry("see", "encode"), Entry("step", "prefill"), Entry("step", "decode")))
    facts = Generation(64, VOCABULARY)
    manifest = Manifest(programs, {}, schedule, tuple(states.values()), generation=facts)
    model = load(write(tmp_path / "memory.tokopt", asdict(manifest), files), threads=1)
    for width in (1, 3, 40):
        rows = np.arange(2 * width).reshape(2, width)
        got = model.generate([[1, 2], [3]], max_tokens=9, inputs={"given": rows})
        sums = rows.sum(1).tolist()
        assert [list(row.tokens) for row in got] == [text([2], sums[0], 9), text([3], sums[1], 9)]


# ----------------------------------------------------------------------------------- any schedule at all


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Programs, links and a schedule of all kinds, most of which fit together."""
    seldom = st.sampled_from([False] * 9 + [True])
    encoders, same = draw(st.integers(0, 2)), draw(st.booleans())
    cut = draw(st.sampled_from([None, None, *(("prefill", "decode") if not same else ())]))
    programs: dict[str, ProgramEntry] = {}
    links: list[Link] = []
    for i in range(encoders):
        programs[f"see_{i}"] = encoder(links=2, given=min(i, 1), output=draw(st.booleans()) and i == 0)
        if i:
            links.append(Link(Port("see_0", "offset_0"), Port("see_1", "given_0"), "once"))
    names = {"prefill": "read", "decode": "read" if same else "go"}
    for role in ("prefill",) if same else ("prefill", "decode"):
        emits = draw(st.sampled_from(["logits", "tokens"]))
        extra = draw(st.sets(st.sampled_from(["mask", "rows", "limit"])))
        if emits == "tokens":
            extra = extra - {"rows"} if draw(seldom) else (extra | {"limit"}) - {"rows"}
        count = draw(st.sampled_from(["n", 1] if role == "decode" else ["n", "n", 3, 1]))
        wanted = draw(st.integers(0, 1)) if encoders else 0
        links_in = wanted + (cut == role)
        programs[names[role]] = reader(*sorted(extra), emits=emits, links=links_in, count=count)
        if cut == role:
            programs["half"] = half(draw(st.sampled_from([count, count, "n"])))
            port = Port(names[role], f"offset_{wanted}")
            links.append(Link(Port("half", "offset_0"), port, "once" if draw(seldom) else "call"))
        if wanted:
            when = draw(st.sampled_from(["once", "call"])) if role == "prefill" else "call"
            links.append(Link(Port(f"see_{encoders - 1}", "offset_1"), Port(names[role], "offset_0"), when))
    slots = {"prefill": draw(st.sampled_from(["n", 5])), "decode": draw(st.sampled_from(["n", DRAWN]))}
    entries = [Entry(f"see_{i}", "encode") for i in range(encoders)]
    for role in ("prefill", "decode"):
        whole = Entry(names[role], role, slots[role])
        entries.append(replace(whole, program="half", then=(whole.program,)) if cut == role else whole)
    if draw(st.booleans()) and cut != "decode":  # the same program once more, which takes over
        programs["later"] = programs[names["decode"]]
        later = [link for link in links if link.target.program == names["decode"]]
        links += [replace(link, target=replace(link.target, program="later"), when="call") for link in later]
        entries.append(Entry("later", "decode", slots["decode"], since=draw(st.sampled_from([1, 2, 4, 0]))))
    if draw(seldom):
        entries = draw(st.permutations(entries))
    triggers: list[Trigger] = []
    if draw(st.booleans()):
        programs["evict"] = evictor(due=draw(st.booleans()))
        for _ in range(draw(st.integers(1, 2))):
            after = draw(st.sampled_from(["prefill", "tokens"]))
            every = draw(st.integers(1, 6)) if (after == "tokens") != draw(seldom) else 0
            triggers.append(Trigger("evict", after, every, draw(st.booleans()) and after == "tokens"))
    schedule = Schedule(tuple(entries), tuple(triggers), draw(seldom))
    states = STATES if triggers else STATES[:2]
    facts = None if draw(seldom) else Generation(40, VOCABULARY, draw(st.sampled_from([(), (3,)])))
    return Manifest(programs, {}, schedule, states, tuple(links), facts)


def within(model: LanguageModel) -> list[list[int]]:
    """The prompts, none longer than the model reads at once, where it must."""
    entry = model.manifest.schedule.entry("prefill")
    assert entry is not None
    once = any(link.when == "once" and link.target.program in entry.programs for link in model.manifest.links)
    tokens = find_role(model.manifest.programs[entry.program].inputs, "tokens")
    assert tokens is not None
    size = tokens.axes[1]
    return [ids[-size:] for ids in PROMPTS] if once and isinstance(size, int) else PROMPTS


@given(manifests(), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_any_schedule_is_refused_or_runs_to_its_end(manifest: Manifest, count: int) -> None:
    try:
        check_format(
            manifest.programs, manifest.states, manifest.links, manifest.schedule, manifest.generation
        )
    except FormatError:
        return
    with TemporaryDirectory() as folder:
        made = opened(Path(folder), manifest)
        inputs = {"images": IMAGES} if made.interface.inputs else None
        got = made.generate(within(made), max_tokens=count, inputs=inputs)
    for row in got:
        assert row.finish == ("stop" if row.tokens[-1] in made.settings.eos else "length")
        assert len(row.tokens) == count or row.finish == "stop"
