"""Conversations: what a turn answers is what the whole conversation is answered, though only what is new is read."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds

import tokopt
from tests.runtime.toys import with_file
from tests.zoo.decoders import GROUPED, VOCABULARY, _hugging_face
from tokopt.cli import main
from tokopt.errors import InputError
from tokopt.ir.format import Generation
from tokopt.runtime import Chat, LanguageModel, Sampling, load
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger
from tokopt.runtime.format.signature import BATCH
from tokopt.runtime.format.state import Occupancy, State
from tokopt.runtime.loop import Request, Snapshot

LETTERS = [chr(33 + i) for i in range(VOCABULARY)]

TEMPLATE = (
    "{% for m in messages %}{{ '#' if m.role == 'assistant' }}{{ m.content }}!{% endfor %}"
    "{{ '#' if add_generation_prompt }}"
)

OPEN = TEMPLATE.replace("}}!", "}}-")
"""Has no special token between messages."""

FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content[:3] }}")
"""Renders answers shorter than they were written."""

SPECULATING, SKIPPING = "speculate{nodes=4 depth=3}", "skipdecode{min=1 over=8}"

EVICTING, GROUPING = "h2o{budget=16 sinks=2 recent=4 every=4}", "kivi{group=8 residual=8 every=8}"

PIPELINES = ("", "sample", SPECULATING, "verify", "int8_kv", SKIPPING, EVICTING, GROUPING)


def tokenizer(letters: Sequence[str] = LETTERS, decoder: Any = None) -> str:
    """Every token is one of the letters, and every letter one token."""
    library: Any = Tokenizer(kinds.WordLevel({letter: i for i, letter in enumerate(letters)}, "!"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.decoder = decoder or decoders.Fuse()
    return library.to_str()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    """One Llama of two layers by pipeline; every letter is a token, and nothing ends an answer but its length."""
    folder = tmp_path_factory.mktemp("chats")
    model: Any = _hugging_face("Llama", **{**GROUPED, "num_hidden_layers": 2}, tie_word_embeddings=True)()
    about = Generation(
        256, VOCABULARY, chat_template=TEMPLATE, chat_templates={"forgetful": FORGETFUL, "open": OPEN}
    )
    bundle = tokopt.capture_lm(model, tokenizer=tokenizer(), generation=about)
    made: dict[str, LanguageModel] = {}
    for place, pipeline in enumerate(PIPELINES):
        done = tokopt.optimize(bundle, pipeline, calibration=["".join(LETTERS)]) if pipeline else bundle
        loaded = load(tokopt.export(done, folder / f"{place}.tokopt"), threads=1)
        assert isinstance(loaded, LanguageModel)
        made[pipeline] = loaded
    return made


EXACT = [pipeline for pipeline in PIPELINES if pipeline not in (EVICTING, GROUPING, SKIPPING)]
"""Where a token's cache does not depend on whether it was read or written."""


@pytest.mark.parametrize("pipeline", EXACT)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_that_to_the_whole_conversation(
    models: dict[str, LanguageModel], pipeline: str, temperature: float
) -> None:
    model = models[pipeline]
    chat, options = model.chat(), {"max_tokens": 9, "sampling": Sampling(temperature, seed=3)}
    for message in ("abc", "hello", "x"):
        before = [*chat.messages, {"role": "user", "content": message}]
        prompt = model.chat_prompt(before)
        held = chat.tokens
        answer = chat.say(message, **options)
        assert answer.tokens == model.generate(prompt, **options).tokens
        assert chat.messages == [*before, {"role": "assistant", "content": answer.text}]
        assert answer.statistics.prompt_tokens == len(prompt) - len(held)


@pytest.mark.parametrize("pipeline", EXACT)
def test_what_the_template_renders_otherwise_is_read_again(
    models: dict[str, LanguageModel], pipeline: str
) -> None:
    model = models[pipeline]
    chat = model.chat(template="forgetful")
    for message in ("abc", "hel", "x"):
        prompt = model.chat_prompt(
            [*chat.messages, {"role": "user", "content": message}], template="forgetful"
        )
        assert chat.say(message, max_tokens=9).tokens == model.generate(prompt, max_tokens=9).tokens


def test_a_drafter_of_the_host_changes_no_answer(models: dict[str, LanguageModel]) -> None:
    model = models["verify"]
    plain, drafted = model.chat(), model.chat()
    for message in ("abcabcabc", "abcab"):
        assert drafted.say(message, max_tokens=8, drafter="suffix") == plain.say(message, max_tokens=8)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_turn_reads_what_is_new_after_what_was_read(
    models: dict[str, LanguageModel], pipeline: str
) -> None:
    """The same reads in the same order, by hand: under eviction, too."""
    model = models[pipeline]
    chat, request, read, text = model.chat(), model.open(1, 0), 0, list[int]()
    for message in ("abcdefghijklmnopqr", "hello", "world"):
        prompt = model.chat_prompt([*chat.messages, {"role": "user", "content": message}])
        answer = chat.say(message, max_tokens=6)
        assert prompt[:read] == text[:read]
        text = [*prompt, *answer.tokens]
        limit = np.array([6])
        emission = request.resume().prefill([prompt[read:]], limit, read)
        got = _taken(emission)
        while len(got) < 6:
            at = np.array([[len(prompt) + len(got) - 1]])
            emission = request.step(np.array([[got[-1]]]), at, limit=limit - len(got))
            got += _taken(emission)
        assert tuple(got) == answer.tokens
        read = len(text) - 1


def _taken(emission: Any) -> list[int]:
    if emission.logits is not None:
        return [int(emission.logits[0, -1].argmax())]
    return emission.tokens[0, : emission.count[0]].tolist()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_rewinding_to_any_turn_gives_the_same_answers(
    models: dict[str, LanguageModel], pipeline: str
) -> None:
    chat = models[pipeline].chat()
    said = ("abcdefghijklmnop", "hello", "x", "yz")
    first = [chat.say(message, max_tokens=5) for message in said]
    for turns in (1, 2, 4):
        chat.rewind(turns)
        assert len(chat.messages) == 2 * (len(said) - turns)
        again = [chat.say(message, max_tokens=5) for message in said[len(said) - turns :]]
        if pipeline in EXACT or turns == len(said) or turns == 1:
            assert again == first[len(said) - turns :]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_saved_chat_goes_on_as_if_it_had_not_been(
    models: dict[str, LanguageModel], pipeline: str, tmp_path: Path
) -> None:
    model = models[pipeline]
    chat = model.chat([{"role": "system", "content": "brief"}])
    chat.say("abcdefghijklmnopqrstu", max_tokens=7)
    chat.save(tmp_path / "talk.chat")
    other = load(model.path, threads=1).open_chat(tmp_path / "talk.chat")
    assert other.messages == chat.messages and other.tokens == chat.tokens
    for message in ("hello", "x"):
        assert other.say(message, max_tokens=7) == chat.say(message, max_tokens=7)


def test_a_prompt_is_read_before_it_is_asked_for(models: dict[str, LanguageModel]) -> None:
    for pipeline in EXACT:
        model = models[pipeline]
        system = [{"role": "system", "content": "answerbriefly"}]
        chat = model.chat(system)
        chat.read()
        assert list(chat.tokens) == model.chat_prompt(system, add_generation_prompt=False)
        answer = chat.say("abc", max_tokens=5)
        assert answer.statistics.prompt_tokens == len("abc!#")
        assert answer == model.chat(system).say("abc", max_tokens=5)


@pytest.mark.parametrize("pipeline", EXACT)
def test_a_stream_left_early_stays_as_far_as_it_was_written(
    models: dict[str, LanguageModel], pipeline: str
) -> None:
    model = models[pipeline]
    chat = model.chat()
    stream = chat.stream("abcabcabc", max_tokens=12)
    shown = next(stream)
    assert chat.messages[0] == {"role": "user", "content": "abcabcabc"}
    assert chat.messages[1]["content"].startswith(shown)
    shown += next(stream)  # looking does not end it
    assert chat.messages[1]["content"].startswith(shown)
    prompt = model.chat_prompt([*chat.messages, {"role": "user", "content": "x"}])
    assert chat.say("x", max_tokens=6).tokens == model.generate(prompt, max_tokens=6).tokens
    late = chat.stream("never begun")
    assert len(chat.messages) == 4
    prompt = model.chat_prompt([*chat.messages, {"role": "user", "content": "yz"}])
    answer = chat.say("yz", max_tokens=6)
    assert not list(stream) and not list(
        late
    )  # what still reads them reaches no cache that goes on elsewhere
    assert answer.tokens == model.generate(prompt, max_tokens=6).tokens
    prompt = model.chat_prompt([*chat.messages, {"role": "user", "content": "x"}])
    assert chat.say("x", max_tokens=6).tokens == model.generate(prompt, max_tokens=6).tokens


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize(
    "drafting", [{}, {"drafter": "token_recycling", "nodes": 4}], ids=["plain", "drafted"]
)
def test_what_fails_in_an_answer_leaves_no_token_in_the_cache(
    models: dict[str, LanguageModel], drafting: dict[str, Any], step: int, kind: type[BaseException]
) -> None:
    """The token of the call that failed was read and not written: the next turn may not find it in the cache."""
    model = models["verify"]

    def failing() -> Any:
        calls = iter(range(1, step + 1))

        def process(history: Any, logits: np.ndarray) -> np.ndarray:
            if next(calls) == step:
                raise kind("no")
            return logits

        return process

    chat, options = model.chat(), {"max_tokens": 9, **drafting}
    chat.say("abc", **options)
    before = chat.messages
    with pytest.raises((InputError, KeyboardInterrupt)):
        chat.say("hello", processors=[failing()], **options)
    assert chat.messages == before
    shown: list[str] = []
    with pytest.raises((InputError, KeyboardInterrupt)):
        shown.extend(chat.stream("hello", processors=[failing()], **options))
    written = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "".join(shown)}]
    assert chat.messages == [*before, *(written if step > 1 else [])]
    for message in ("x", "yz"):
        prompt = model.chat_prompt([*chat.messages, {"role": "user", "content": message}])
        assert chat.say(message, **options).tokens == model.generate(prompt, **options).tokens


def test_a_stream_that_nobody_reads_leaves_the_cache(
    models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    chat = models[""].chat()
    chat.say("abc", max_tokens=4)
    held = chat.tokens
    chat.stream("never begun")
    chat.save(tmp_path / "a.chat")
    assert chat.tokens == held


def test_a_stop_string_within_a_call_leaves_nothing_behind_it(models: dict[str, LanguageModel]) -> None:
    """Tokens that a call committed behind it are not in the conversation, nor in the cache."""
    model = models[SPECULATING]
    whole = model.chat().say("abab", max_tokens=24)
    assert whole.text
    for letter in dict.fromkeys(whole.text):
        chat = model.chat()
        cut = chat.say("abab", max_tokens=24, stop=letter, nodes=4)
        assert cut.text == whole.text[: whole.text.index(letter)]
        prompt = model.chat_prompt([*chat.messages, {"role": "user", "content": "x"}])
        assert chat.say("x", max_tokens=6).tokens == model.generate(prompt, max_tokens=6).tokens


def test_what_is_refused_leaves_the_conversation_as_it_was(
    models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    model = models[""]
    chat = model.chat()
    chat.say("abc", max_tokens=4)
    before = chat.messages
    for content, options, reason in (
        (5, {}, "content"),
        ("a" * 300, {}, "the chat would have .* rewind it, say less, or begin another chat"),
        ("a", {"max_tokens": -1}, "max_tokens"),
        ("a", {"nodes": 2}, "speculate"),
    ):
        with pytest.raises(InputError, match=reason):
            chat.say(content, **options)  # pyright: ignore[reportArgumentType]
        assert chat.messages == before
    with pytest.raises(InputError, match="turns to go back to: 1; rewind by no more"):
        chat.rewind(2)
    with pytest.raises(InputError, match="nothing was read"):
        model.chat().save(tmp_path / "empty.chat")
    with pytest.raises(InputError, match="nothing to read"):
        model.chat().read()


def test_a_chat_that_filled_the_context_can_be_saved_and_rewound(
    models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    model = models[""]
    chat = model.chat([{"role": "system", "content": "brief"}])
    wanted = chat.say("abc", max_tokens=4)
    chat.rewind()
    assert chat.say("a" * 200).finish == "length" and len(chat.tokens) == 255
    chat.save(tmp_path / "full.chat")
    opened = model.open_chat(tmp_path / "full.chat")
    for call in (chat, opened):
        with pytest.raises(InputError, match=r"the chat would have .* holds 256; rewind it"):
            call.say("abc")
        call.rewind()
        assert call.say("abc", max_tokens=4) == wanted


def test_files_that_do_not_fit_are_refused(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    """Another artifact's, none at all, and one that says more slots are used than there are."""
    path, model = tmp_path / "talk.chat", models[""]
    chat = model.chat()
    chat.say("abc", max_tokens=4)
    chat.save(path)
    with pytest.raises(InputError, match="another artifact"):
        models["sample"].open_chat(path)
    (tmp_path / "text.chat").write_text("no chat")
    with pytest.raises(InputError, match="no chat that was saved"):
        model.open_chat(tmp_path / "text.chat")
    with pytest.raises(InputError, match=r"there is no file .*missing.chat; a chat is written by chat.save"):
        model.open_chat(tmp_path / "missing.chat")
    with safetensors.safe_open(path, "numpy") as file:
        about = file.metadata()
    for change in ({"state.length": np.array([500])}, {"state.key_0": np.zeros((1, 1), np.float32)}):
        save_file({**load_file(path), **change}, tmp_path / "damaged.chat", about)
        with pytest.raises(InputError, match="is damaged: state"):
            model.open_chat(tmp_path / "damaged.chat")


# --- several chats ------------------------------------------------------------------------------------------

SAID = ("abcdefghijklmnopqr", "x", "hello")

GREEDY, DRAFTED = {"max_tokens": 9}, {"max_tokens": 9, "drafter": "suffix", "nodes": 4}

DRAWN = {"max_tokens": 9, "sampling": Sampling(1.0, seed=3), "stop": LETTERS[::3]}
"""One of several letters ends a text, so that those of a batch end at different calls."""


def talks(model: LanguageModel) -> list[Chat]:
    """Chats of different lengths: with two turns behind it, none, and one."""
    chats = [model.chat(), model.chat([{"role": "system", "content": "brief"}]), model.chat()]
    chats[0].say("abcabcabcabcabcabcabcabc", max_tokens=7)
    chats[0].say("y", max_tokens=2)
    chats[2].say("world", max_tokens=3)
    return chats


def cache(chat: Chat, folder: Path) -> dict[str, np.ndarray]:
    """The states of a chat, by name; of those in groups the part that is read."""
    chat.save(folder / "saved.chat")
    found = load_file(folder / "saved.chat")
    if "state.recent_length" in found:
        old = int(found["state.length"][0] - found["state.recent_length"][0])
        for name in found:
            if name.endswith(("_codes", "_scale", "_zero")):
                found[name] = found[name][:, :, :old]
    return found


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [*((pipeline, options) for pipeline in PIPELINES for options in (GREEDY, DRAWN)), ("verify", DRAFTED)],
)
def test_chats_that_take_a_turn_together_are_as_if_each_took_it_alone(
    models: dict[str, LanguageModel], pipeline: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Answers, tokens, what is in the cache, and what follows from it: for chats of any length."""
    model = models[pipeline]
    alone, together = talks(model), talks(model)
    wanted = [chat.say(content, **options) for chat, content in zip(alone, SAID, strict=True)]
    assert model.say_all(together, SAID, **options) == wanted
    assert len({len(answer.tokens) for answer in wanted}) > 1 or options is not DRAWN
    for one, other in zip(alone, together, strict=True):
        assert (other.messages, other.tokens) == (one.messages, one.tokens)
        if one.tokens:  # none where a call wrote more than the text has
            states = cache(one, tmp_path), cache(other, tmp_path)
            assert states[0].keys() == states[1].keys()
            for name, x in states[0].items():
                near = 1 if x.dtype.itemsize == 1 else 1e-6  # a number between two codes may get either
                np.testing.assert_allclose(states[1][name], x, rtol=1e-5, atol=near, err_msg=name)
    for one, other in zip(alone, together, strict=True):
        assert one.say("and", max_tokens=7) == other.say("and", max_tokens=7)


def test_a_turn_of_one_chat_and_of_no_tokens(models: dict[str, LanguageModel]) -> None:
    model = models[""]
    assert model.say_all([model.chat()], ["abc"], max_tokens=4) == [model.chat().say("abc", max_tokens=4)]
    chats = talks(model)
    before = [(chat.messages, chat.tokens) for chat in chats]
    assert [answer.tokens for answer in model.say_all(chats, SAID, max_tokens=0)] == [()] * 3
    assert [(chat.messages, chat.tokens) for chat in chats] == before


def test_without_a_seed_every_chat_draws_by_its_own(models: dict[str, LanguageModel]) -> None:
    for pipeline in ("", "sample"):
        model = models[pipeline]
        chats = [model.chat() for _ in range(4)]
        answers = model.say_all(chats, ["abc"] * 4, max_tokens=8, sampling=Sampling(2.0))
        assert len({answer.tokens for answer in answers}) > 1


def test_what_fails_leaves_every_chat_as_it_was(models: dict[str, LanguageModel]) -> None:
    """Whatever is refused before, in the prompt of one of them, or in a call of all."""
    model, calls = models["verify"], iter(range(100))

    def interrupted(history: Any, logits: np.ndarray) -> np.ndarray:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return logits

    chats, wanted = talks(model), [chat.say("and", max_tokens=5) for chat in talks(model)]
    before = [chat.messages for chat in chats]
    stranger = models[""].chat()
    for given, contents, options, reason in (
        ([], [], {}, "0 chats and 0 messages"),
        (chats, SAID[:2], {}, "3 chats and 2 messages"),
        ([chats[0], chats[0]], SAID[:2], {}, "chat 1 is there twice"),
        ([chats[0], stranger], SAID[:2], {}, "chat 1 is one with .*, not with"),
        (chats[0], ["x"], {}, "chats is"),
        (["x"], ["x"], {}, "an item of chats is"),
        (chats, "xyz", {}, "contents is"),
        (chats, ["x", 5, "y"], {}, "chat 1: content is 5"),
        (chats, ["x", "a" * 300, "y"], {}, "chat 1: the chat would have .* holds 256; rewind it"),
        (chats, SAID, {"max_tokens": -1}, "max_tokens"),
        (chats, SAID, {"processors": [lambda *_: 5]}, "processor 0"),
    ):
        with pytest.raises(InputError, match=reason):
            model.say_all(given, contents, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyboardInterrupt):
        model.say_all(chats, SAID, processors=[interrupted])
    assert [chat.messages for chat in chats] == before
    assert model.say_all(chats, ["and"] * 3, max_tokens=5) == wanted


def snapshots(size: int | None = None, kind: str = "table") -> tuple[Any, list[Snapshot]]:
    """What is asked of a manifest, and two requests of different lengths."""
    used = Occupancy("length")
    states = (
        State("length", "length", "int64", (BATCH,)),
        State("slots", "position", "int64", (BATCH, "slots"), initial=-1, occupancy=used),
        State("seen", kind, "int64", (4,)),
    )
    links = (
        Link(Port("lower", "x"), Port("upper", "x"), "call"),
        Link(Port("images", "x"), Port("upper", "y"), "call"),
    )
    entries = (Entry("images", "encode"), Entry("lower", "decode", then=("upper",)))
    made = [
        Snapshot(
            {"length": np.array([n]), "slots": np.arange(n)[None], "seen": np.full(4, n)},
            {Port("upper", "x"): np.zeros((1, n)), Port("upper", "y"): np.full((1, size or n), n)},
            (np.array([n]),),
        )
        for n in (3, 2)
    ]
    return SimpleNamespace(states=states, links=links, schedule=Schedule(entries)), made


def test_joined_requests_have_free_slots_behind_the_shorter_ones() -> None:
    """A table is that of the first, what links carry within a call is left out, and what is one for all is refused."""
    joined = Snapshot.joined(*snapshots(size=1))
    assert joined.states["slots"].tolist() == [[0, 1, 2], [0, 1, -1]]
    assert joined.states["length"].tolist() == [3, 2] and joined.states["seen"].tolist() == [3] * 4
    assert {port.name: x.tolist() for port, x in joined.links.items()} == {"y": [[3], [2]]}
    assert [counts.tolist() for counts in joined.since] == [[3, 2]]
    with pytest.raises(InputError, match="'y' of program 'upper' has another size"):
        Snapshot.joined(*snapshots())
    with pytest.raises(InputError, match="'seen' is one for all rows"):
        Snapshot.joined(*snapshots(size=1, kind="memory"))


def test_a_program_that_works_on_all_rows_at_once_is_refused() -> None:
    """A row's turn comes after as many tokens of its own; without an input that says whose it is, all would be due."""
    schedule = Schedule((), (Trigger("tidy", "tokens", 4),))
    program = SimpleNamespace(inputs=())
    request: Any = SimpleNamespace(schedule=schedule, manifest=SimpleNamespace(programs={"tidy": program}))
    with pytest.raises(InputError, match="program 'tidy' works on all rows of a batch at once"):
        Request.joined([request, request])


# --- one call at a time -----------------------------------------------------------------------------------


def test_a_chat_in_the_middle_of_a_call_refuses_another(models: dict[str, LanguageModel]) -> None:
    """Of another thread, and of what the call itself calls."""
    model = models[""]
    chat, reached, go_on = model.chat(), threading.Event(), threading.Event()

    def waiting(history: Any, logits: np.ndarray) -> np.ndarray:
        reached.set()
        assert go_on.wait(60)
        return logits

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat.say, "abc", max_tokens=3, processors=[waiting])
        assert reached.wait(60)
        for call in (lambda: chat.say("x"), chat.read, chat.rewind, lambda: model.say_all([chat], ["x"])):
            with pytest.raises(InputError, match="another call is in the middle of this chat"):
                call()
        go_on.set()
        assert answer.result() == model.chat().say("abc", max_tokens=3)
    with pytest.raises(InputError, match=r"processor 0 .* another call is in the middle"):
        chat.say("x", processors=[lambda history, logits: chat.say("y") and logits])
    stream: Any = chat.stream("x", processors=[lambda history, logits: next(stream) and logits])
    with pytest.raises(InputError, match=r"processor 0 .* another call is in the middle"):
        next(stream)


# --- the tokens of answers --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def spelling(models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The model with a tokenizer that spells "A" as "a", and finds "!" in every text."""
    folder = tmp_path_factory.mktemp("spelling") / "model.tokopt"
    shutil.copytree(models[""].path, folder)
    lower = [decoders.Replace(letter, letter.lower()) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    library: Any = Tokenizer.from_str(tokenizer(decoder=decoders.Sequence([*lower, decoders.Fuse()])))
    library.add_special_tokens(["!"])
    with_file(folder, "tokenizer", "tokenizer.json", library.to_str().encode())
    return load(folder, threads=1)


def forced(text: str, prompt: int) -> Any:
    """Has a text written letter by letter, behind a prompt of so many tokens."""

    def process(history: Any, logits: np.ndarray) -> np.ndarray:
        made = np.full_like(logits, -np.inf)
        made[:, LETTERS.index(text[len(history[0]) - prompt])] = 0
        return made

    return process


def written(chat: Chat, content: str, text: str, **options: Any) -> list[int]:
    """The prompt of a turn, which is answered by these letters."""
    prompt = chat.prompt(content)
    chat.say(content, max_tokens=len(text), processors=[forced(text, len(prompt))], **options)
    return prompt


def test_the_tokens_that_were_written_stand_for_an_answer(spelling: LanguageModel, tmp_path: Path) -> None:
    """What a turn reads is new, though the tokenizer spells the answers otherwise; the text is what it was."""
    chat = spelling.chat([{"role": "system", "content": "brief"}])
    prompts = [written(chat, "abc", "xYZ"), written(chat, "hello", "Ab"), chat.prompt("x")]
    before = [*chat.messages, {"role": "user", "content": "x"}]
    assert [message["content"] for message in before] == ["brief", "abc", "xyz", "hello", "ab", "x"]
    assert prompts[2] == [LETTERS.index(letter) for letter in "brief!abc!#xYZ!hello!#Ab!x!#"]
    assert spelling.tokenizer.decode(prompts[2], special=True) == spelling.chat_text(before)
    assert prompts[2] != spelling.chat_prompt(before)
    chat.save(tmp_path / "talk.chat")
    opened = spelling.open_chat(tmp_path / "talk.chat")
    assert opened.prompt("x") == prompts[2]
    answer = chat.say("x", max_tokens=6)
    assert answer == opened.say("x", max_tokens=6) == spelling.generate(prompts[2], max_tokens=6)
    assert answer.statistics.prompt_tokens == len(
        "b!x!#"
    )  # the last letter of an answer is read with what follows
    chat.rewind()
    assert chat.prompt("x") == prompts[2]
    chat.rewind()
    assert chat.prompt("hello") == prompts[1]


@pytest.mark.parametrize(
    ("text", "options", "variables"),
    [
        ("xYZ!xY", {}, {}),
        ("xYZabc", {"stop": "zab"}, {}),
        ("xYZabc", {}, {"template": "forgetful"}),
        ("xYZabc", {}, {"template": "open"}),
    ],
    ids=["special", "stopped", "changed", "no-special"],
)
def test_an_answer_that_is_not_its_tokens_is_spelled_anew(
    spelling: LanguageModel, text: str, options: dict[str, Any], variables: dict[str, Any]
) -> None:
    """A special token in it, a stop string that cut it, a template that changes it, or none that is special behind."""
    chat = spelling.chat(**variables)
    written(chat, "abc", text, **options)
    prompt = chat.prompt("x")
    before = [*chat.messages, {"role": "user", "content": "x"}]
    assert prompt == spelling.chat_prompt(before, **variables)
    assert chat.say("x", max_tokens=5) == spelling.generate(prompt, max_tokens=5)


def test_a_file_whose_answers_have_no_tokens_is_refused(spelling: LanguageModel, tmp_path: Path) -> None:
    path, chat = tmp_path / "talk.chat", spelling.chat()
    written(chat, "abc", "XY")
    chat.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        about = file.metadata()
    for parts in ("5", '[{"messages": 2, "text": "a", "tokens": [999]}]', "[{}]"):
        save_file(load_file(path), tmp_path / "damaged.chat", {**about, "parts": parts})
        with pytest.raises(InputError, match="is damaged: its answers have no tokens"):
            spelling.open_chat(tmp_path / "damaged.chat")


def test_a_file_in_which_other_tokens_stand_for_an_answer_is_refused(
    spelling: LanguageModel, tmp_path: Path
) -> None:
    """The model would read another text than is shown; so it is with messages, tokens and links that are none."""
    path, damaged, chat = tmp_path / "talk.chat", tmp_path / "damaged.chat", spelling.chat()
    written(chat, "abc", "XY")
    chat.save(path)
    arrays = load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        about = file.metadata()
    part = json.loads(about["parts"])[0]
    lies = [{"tokens": part["tokens"][::-1]}, {"tokens": part["tokens"][:-1]}, {"tokens": [5]}]
    lies += [{"text": ""}, {"text": "abd!#xy"}, {"messages": 9}, {"messages": 0}, {"messages": 1}]
    changes = [({"parts": json.dumps([{**part, **lie}])}, {}) for lie in lies]
    changes += [({"messages": text}, {}) for text in ("5", "null", "[5]", "{}")]
    changes += [({"parts": "[" * 99999}, {}), ({"links": '[["a", "b"]]'}, {"link.0": np.zeros(1)})]
    changes += [({}, {"tokens": tokens}) for tokens in (np.zeros((2, 2), np.int64), np.zeros(2))]
    for told, given in changes:
        save_file({**arrays, **given}, damaged, {**about, **told})
        with pytest.raises(InputError, match="is damaged"):
            spelling.open_chat(damaged)
    answer: Any = chat.messages[1]
    answer["content"] = "other"
    chat.save(path)
    assert spelling.open_chat(path).prompt("x") == chat.prompt("x")


# --- the command ------------------------------------------------------------------------------------------


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *options: object
) -> str:
    """What ``tokopt chat`` prints when these lines are its input; it has to end well."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", *map(str, options)]) == 0
    return capsys.readouterr().out


def test_the_command_answers_line_by_line(
    models: dict[str, LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rewinding, saving, and going on with what was saved give what the same calls in Python give."""
    model, path = models[""], tmp_path / "talk.chat"
    chat = model.chat([{"role": "system", "content": "brief"}])
    wanted = [chat.say(message, max_tokens=6).text for message in ("abc", "hello")]
    options = (model.path, "--max-tokens", 6)
    shown = typed(
        monkeypatch,
        capsys,
        f"abc\n\nx\n/rewind\nhello\n/save {path}\n/quit\nnever",
        *options,
        "--system",
        "brief",
    ).splitlines()
    assert [shown[0], shown[3]] == wanted and shown[2] == "3 messages left"
    found = json.loads(typed(monkeypatch, capsys, "yz\n", *options, "--open", path, "--json"))
    chat.say("yz", max_tokens=6)
    assert found["messages"] == chat.messages


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        ("/rewind x", (), "no number of turns"),
        ("/save", (), "name the file"),
        ("/nothing", (), "no command /nothing"),
        ("a" * 300, (), "rewind it, say less, or begin another chat"),
        ("", ("--open", "a", "--system", "b"), "begun already"),
    ],
)
def test_the_command_says_what_is_wrong(
    models: dict[str, LanguageModel],
    lines: str,
    options: tuple[str, ...],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And goes on with the next line."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{lines}\nabc\n"))
    assert main(["chat", str(models[""].path), "--max-tokens", "3", *options]) == 2
    shown = capsys.readouterr()
    assert reason in shown.err
    assert shown.out == ("" if options else f"{models[''].chat().say('abc', max_tokens=3).text}\n")
