"""A model that speculates writes the text that it writes without, token for token, whatever is proposed."""

from __future__ import annotations

import numpy as np
import pytest

import tokopt
from tests import node
from tests.matrix.language import artifact, bundle, prompt
from tests.zoo.decoders import CONTEXT
from tokopt.errors import InputError, PassError
from tokopt.runtime import LanguageModel, Sampling, load
from tokopt.runtime.format.state import slot_axis

CASES = (
    ("llama", "", "speculate"),
    ("mistral", "adakv{press=h2o{budget=48 every=8}}", "speculate{drafter=token_recycling nodes=12}"),
)
"""Decoder, the passes before, and the pass: windows, heads with lengths of their own, triggers in the middle."""

OPTIONS = (Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.7, top_k=5, seed=1))

cases = pytest.mark.parametrize(("name", "passes", "pass_"), CASES)


def speculating(name: str, passes: str, pass_: str) -> LanguageModel:
    return artifact(name, f"{passes},{pass_}" if passes else pass_)


@cases
@pytest.mark.filterwarnings("ignore:.*about none was accepted")
@pytest.mark.parametrize("sampling", OPTIONS, ids=["greedy", "drawn", "top_k"])
def test_speculation_changes_no_token(name: str, passes: str, pass_: str, sampling: Sampling) -> None:
    """Of one text, of a text that repeats itself, and of rows that advance by different numbers of tokens.

    However many nodes a call gets: as many as are fastest, which depends on the machine, or as many as the caller says.
    """
    plain, fast = artifact(name, passes), speculating(name, passes, pass_)
    prompts = [prompt(n, seed=n) for n in (3, 17, 8)]
    for given in (prompts[1], prompt(7) * 6, prompts):
        want = plain.generate(given, max_tokens=60, sampling=sampling)
        for nodes in (None, 1, fast.nodes):
            assert fast.generate(given, max_tokens=60, sampling=sampling, nodes=nodes) == want


@pytest.mark.filterwarnings("ignore:.*about none was accepted")
def test_candidates_of_the_last_place_change_no_token() -> None:
    """A tree of a lookup and of candidates beside it, of rows that have one, none, and nothing yet."""
    plain, fast = artifact("llama"), artifact("llama", "speculate{drafter=logitspec nodes=12}")
    given = [prompt(7) * 6, prompt(3, seed=3), prompt(1)]
    for sampling in OPTIONS[:2]:
        want = plain.generate(given, max_tokens=40, sampling=sampling)
        assert fast.generate(given, max_tokens=40, sampling=sampling, nodes=12) == want


def test_renumbered_positions_are_kept() -> None:
    """Positions count from a state that grows as slots are renumbered: committed slots hold what was written."""
    passes, ids = "streaming{budget=48 rerotate=true every=16}", prompt(17)
    fast = artifact("llama", f"{passes},speculate")
    want = artifact("llama", passes).generate(ids, max_tokens=100)
    got = fast.generate(ids, max_tokens=100, nodes=fast.nodes)
    assert got == want and got.statistics.tokens_per_call > 2


def test_with_one_node_the_program_decodes_that_reads() -> None:
    """It proposes nothing; a host may run it in every call, and finds the same states."""
    schedule = artifact("llama", "speculate").manifest.schedule
    (reading,), (plain, proposing) = (tuple(schedule.of_role(role)) for role in ("prefill", "decode"))
    assert plain.program == reading.program != proposing.program
    assert not plain.tree and len(proposing.tree) == 8
    assert (schedule.decode(1), schedule.decode(2), schedule.decode()) == (plain, proposing, proposing)


@pytest.mark.filterwarnings("ignore:.*about none was accepted")
def test_with_kernels_both_programs_round_alike() -> None:
    """Weights in blocks, and an attention that gives a token the same bits alone and among others."""
    model, ids = artifact("llama", "rtn{group=16},speculate"), prompt(7) * 6
    if not model.kernels.library:
        pytest.skip(str(model.kernels))
    plain, whole = (model.generate(ids, max_tokens=60, nodes=nodes) for nodes in (1, model.nodes))
    assert whole.statistics.decode_calls < plain.statistics.decode_calls
    assert plain.tokens == whole.tokens and plain.logprobs == whole.logprobs


@cases
def test_fewer_calls_write_the_same_text(name: str, passes: str, pass_: str) -> None:
    """Toy models repeat themselves, and what repeats is proposed."""
    model = speculating(name, passes, pass_)
    done = model.generate(prompt(7) * 6, max_tokens=100, nodes=model.nodes).statistics
    assert done.new_tokens == 100
    assert done.decode_calls < 85 and done.tokens_per_call > 100 / 85 and done.nodes_per_call == model.nodes


def test_statistics_count_calls_and_what_they_gave() -> None:
    """Of rows that end at different calls; with one node every call gives a token."""
    model = artifact("llama", "speculate")
    prompts = [prompt(n, seed=n) for n in (3, 17, 8)]
    done = model.generate(prompts, max_tokens=40)[0].statistics
    assert sum(n * count for n, count in enumerate(done.commits, 1)) == done.new_tokens - len(prompts) == 117
    assert done.decode_calls <= sum(done.commits) <= 3 * done.decode_calls <= 3 * done.decode_nodes
    alone = model.generate(prompts[0], max_tokens=40, nodes=1).statistics
    assert alone.commits == (39,) and alone.decode_nodes == alone.decode_calls == 39
    assert artifact("llama").generate(prompts[0], max_tokens=40).statistics.commits == (39,)


def test_that_nothing_is_accepted_is_said_once() -> None:
    """Where tokens are drawn from nearly all alike; for the text it does not matter."""
    model = load(artifact("llama", "speculate").path, threads=1)
    assert isinstance(model, LanguageModel)
    sampling = Sampling(temperature=1000.0, seed=1)
    with pytest.warns(UserWarning, match="about none was accepted") as said:
        for _ in range(2):
            model.generate(prompt(5), max_tokens=140, sampling=sampling, nodes=2)
    assert len(said) == 1


@pytest.mark.parametrize("nodes", [0, 9, 2.5])
def test_trees_of_other_sizes_are_refused(nodes: int) -> None:
    with pytest.raises(InputError, match="nodes"):
        artifact("llama", "speculate").generate(prompt(5), nodes=nodes)
    with pytest.raises(InputError, match="does not speculate"):
        artifact("llama").generate(prompt(5), nodes=1)


def test_the_cache_is_that_of_plain_decoding() -> None:
    """Slot for slot: entries of rejected tokens are gone, those of accepted ones are where they would be."""
    ids, count = prompt(9), 30
    plain, fast = artifact("llama"), artifact("llama", "speculate")
    text = list(plain.generate(ids, max_tokens=count).tokens)
    first = plain.open(1, 64)
    first.prefill([[*ids, *text[:-1]]])
    second = fast.open(1, 64)
    limit, made = np.array([count]), second.prefill([ids], np.array([count]))
    got = made.tokens[0, : made.count[0]].tolist()  # type: ignore[index]
    while len(got) < count:
        last, position = np.array([[got[-1]]]), np.array([[len(ids) + len(got) - 1]])
        made = second.step(last, position, limit=limit - len(got))
        got += made.tokens[0, : made.count[0]].tolist()  # type: ignore[index]
    assert got == text
    used = len(ids) + count - 1
    for state in plain.manifest.states:
        axis = slot_axis(state.axes)
        if axis is not None:
            place = state.axes.index(axis)
            want, found = (
                request.buffers.read(state.name).take(range(used), place) for request in (first, second)
            )
            np.testing.assert_allclose(found, want, atol=1e-5)
            if state.kind == "position":
                rest = second.buffers.read(state.name)
                assert (rest.take(range(used, rest.shape[place]), place) == -1).all()


def test_a_text_goes_on_to_the_end_of_the_context() -> None:
    """Of a model with an embedding for every position: nodes that are too deep have none."""
    ids = prompt(7) * 44
    plain = artifact("gpt2").generate(ids, max_tokens=99)
    model = artifact("gpt2", "speculate")
    got = model.generate(ids, max_tokens=99, nodes=model.nodes)
    assert got == plain and len(ids) + len(got.tokens) == CONTEXT


def test_log_probabilities_are_those_of_the_model() -> None:
    ids = prompt(7) * 6
    made = artifact("llama", "speculate").generate(ids, max_tokens=20, sampling=OPTIONS[2])
    assert made.logprobs is not None and len(made.logprobs) == 20
    want = artifact("llama").score([*ids, *made.tokens])[len(ids) - 1 :]
    np.testing.assert_allclose(made.logprobs, want, atol=1e-5)


def test_an_end_token_in_the_middle_of_a_call_ends_the_text() -> None:
    """What was committed behind it is not shown."""
    ids = prompt(7) * 6
    model = artifact("llama", "speculate")
    text = model.generate(ids, max_tokens=60).tokens
    stream = model.tokens(ids, max_tokens=60)
    assert tuple(token for token, _ in zip(stream, range(5), strict=False)) == text[:5]
    assert model.generate(ids, max_tokens=60).tokens == text  # a stream that was left behind leaves no state


def test_a_host_that_only_runs_programs_speculates() -> None:
    model, ids = artifact("llama", "speculate"), prompt(7) * 6
    want = model.generate(ids, max_tokens=40, sampling=OPTIONS[1])
    options = {"temperature": 1.0, "seed": 3}
    assert node.generate(model.path, ids, 40, sampling=options) == list(want.tokens)


def test_it_comes_last() -> None:
    with pytest.raises(PassError, match="here they are two"):
        tokopt.optimize(bundle("llama"), "speculate{drafter=prompt_lookup},h2o{budget=48}")
