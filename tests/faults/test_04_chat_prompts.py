"""Chat prompts began with the wrong token, and templates with ``strftime_now`` or ``{% generation %}`` failed.

``bos_token`` was spelled from the id in config.json, where transformers takes it from tokenizer_config.json, and the
template got two variables and one function. The law: whatever ``apply_chat_template`` renders, ``render_chat`` renders
the same, and what it refuses is an InputError. The templates in ``tests/data/chat`` are those of eleven model families.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokopt.errors import CaptureError, InputError
from tokopt.frontend.texts import read_texts
from tokopt.runtime.chat import choose_template, render_chat
from tokopt.runtime.text import Tokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "chat"
FAMILIES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))

SYSTEM = {"role": "system", "content": "  Be brief. /no_think "}
USER = {"role": "user", "content": " What is 2 + 2? <b>\"quoted\"</b> & 'so' é🙂\n"}
ANSWER = {"role": "assistant", "content": "<think>\nadd\n</think>\n\nFour.", "tool_calls": None}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "I have to look.",
    "tool_calls": [
        {
            "id": "call12345",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich <b>", "days": 3}},
        }
    ],
}
RESULT = {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": "call12345"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city in the next days, one line for each of them & its <nights>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"type": "array", "items": {"type": "string", "enum": ["C", "F"]}},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
PARTS = {
    "role": "user",
    "content": [{"type": "image", "url": "a"}, {"type": "text", "text": " What is it? "}],
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "answered": [SYSTEM, USER, ANSWER, USER],
    "ends with an answer": [USER, ANSWER],
    "tools": [USER, CALL, RESULT, RESULT],
    "answer behind tools": [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
    "parts": [PARTS],
    "two questions": [USER, USER],
    "answer first": [ANSWER],
    "result first": [RESULT, USER],
    "no content": [{"role": "user"}],
    "other role": [USER, {"role": "stop", "content": "x"}, USER],
}
VARIABLES: dict[str, dict[str, Any]] = {
    "none": {},
    "answer follows": {"add_generation_prompt": True},
    "tools": {"tools": [WEATHER, CLOCK], "add_generation_prompt": True},
    "documents": {"documents": [{"title": "A", "text": "<one>"}, {"title": "B", "text": "two"}]},
    "own": {
        "enable_thinking": False,
        "date_string": "1 May 2025",
        "reasoning_effort": "high",
        "add_generation_prompt": True,
        "xml_tools": [{"a": np.int64(3)}, (1.5, None)],
    },
}


def byte_library(special: tuple[str, ...]) -> Library:
    """One token per byte behind the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library: Any = Library(models.BPE({text: i for i, text in enumerate([*special, *letters])}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens([*special, "<|im_start|>"])
    return library


@dataclass(frozen=True)
class Reference:
    """The tokenizer of transformers, and what tokopt reads of the same folder."""

    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("folder")
    config = {"model_type": "llama", "bos_token_id": 5, "eos_token_id": 6}
    (folder / "config.json").write_text(json.dumps(config))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_library(("<unk>", "<s>", "</s>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"
    fast.save_pretrained(folder)
    return Reference(AutoTokenizer.from_pretrained(folder), folder)


def both(tokenizer: Any, template: str, messages: Any, variables: dict[str, Any]) -> tuple[str, str]:
    """What transformers and tokopt render; "refused" where they refuse."""
    try:
        wanted = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)
    except Exception:
        wanted = "refused"
    try:
        found = render_chat(template, messages, {**tokenizer.special_tokens_map, **variables})
    except InputError:
        found = "refused"
    return wanted, found


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_model_families_render_as_in_transformers(reference: Reference, family: str) -> None:
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    texts: set[str] = set()
    for name, messages in CONVERSATIONS.items():
        for kind, variables in VARIABLES.items():
            wanted, found = both(reference.tokenizer, template, messages, variables)
            assert found == wanted, (name, kind)
            texts.add(wanted)
    assert len(texts) > 5, "most conversations are refused by this template"


FEATURES = (TEMPLATES / "features.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("template", [*FEATURES, "   {% if true %}\n  lstrip{% endif %}\n   trim\n"])
def test_what_templates_use_of_jinja_renders_as_in_transformers(reference: Reference, template: str) -> None:
    wanted, found = both(reference.tokenizer, template, [SYSTEM, USER], {})
    assert found == wanted


def test_special_tokens_are_those_of_the_tokenizer(reference: Reference) -> None:
    texts = read_texts(reference.folder)
    assert texts.special_tokens == reference.tokenizer.special_tokens_map
    assert texts.tokenizer is not None and texts.special_tokens is not None
    text = render_chat(texts.chat_templates["default"], [USER], texts.special_tokens)
    ids = Tokenizer(texts.tokenizer, 300).encode_parts(text)
    assert ids[0] == 1  # config.json says 5
    assert ids == reference.tokenizer.apply_chat_template([USER], return_dict=False)


@pytest.mark.parametrize("where", ["settings", "list", "files", "processor", "beside"])
def test_templates_are_found_where_transformers_writes_them(tmp_path: Path, where: str) -> None:
    templates = {"default": "d", "tool_use": "t", "rag": "r"}
    named = [{"name": name, "template": template} for name, template in templates.items()]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if where == "settings":
        settings["chat_template"], templates = "d", {"default": "d"}
    elif where == "list":
        settings["chat_template"] = named
    elif where == "processor":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "d"}))
        templates = {"default": "d"}
    else:
        settings["chat_template"] = "what files of their own come before"
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text("d")
        for name in ("tool_use", "rag"):
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(templates[name])
    byte_library(("<s>",)).save(str(tmp_path / "tokenizer.json"))
    if where != "beside":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_texts(tmp_path)
    assert found.chat_templates == templates
    if where in ("settings", "list", "files"):
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert choose_template(templates, None, tools=False) == loaded.get_chat_template()
        assert choose_template(templates, None, tools=True) == loaded.get_chat_template(tools=[WEATHER])


def test_a_template_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no chat template 'rag'; name one of default, tool_use"):
        choose_template({"tool_use": "", "default": ""}, "rag", tools=False)
    with pytest.raises(InputError, match="has no chat template"):
        choose_template({}, None, tools=True)


@pytest.mark.parametrize("template", ["{{ m }}", "qwen3", "llama3", "phi3", "gemma3"])
@pytest.mark.parametrize("part", ["content", "reasoning_content"])
def test_an_answer_is_continued_as_in_transformers(reference: Reference, template: str, part: str) -> None:
    if template in FAMILIES:
        template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    last = {"role": "assistant", "content": " Four, since ", "reasoning_content": "add them"}
    for messages in ([USER, last], [USER, {**last, "content": [{"type": "text", "text": "Four "}]}], [USER]):
        try:
            wanted = reference.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, continue_final_message=part
            )
        except Exception:
            wanted = "refused"
        try:
            found = render_chat(template, messages, reference.tokenizer.special_tokens_map, part)
        except InputError:
            found = "refused"
        assert found == wanted


def test_an_answer_is_continued_or_begun() -> None:
    with pytest.raises(InputError, match="either continued or begun"):
        render_chat("{{ messages }}", [USER], {"add_generation_prompt": True}, "content")


@dataclass
class Spoken:
    role: str
    content: str


class Turn(str):
    """Text with methods that a template must not reach."""

    def __str__(self) -> str:
        return "another text"


def mixed() -> Iterator[Any]:
    yield MappingProxyType({"role": Turn("system"), "content": Turn("as it is")})
    yield Spoken("user", "a dataclass")
    yield {"role": "assistant", "content": np.float64(1.5), "image": np.zeros(3), "ok": np.bool_(False)}


def test_messages_are_given_as_plain_data(reference: Reference) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.image }} {{ m.ok }};{% endfor %}"
    text = render_chat(template, list(mixed()), {})
    assert text == "system: as it is  ;user: a dataclass  ;assistant: 1.5 <ndarray> False;"
    dicts = [message for message in mixed() if not isinstance(message, Spoken)]
    assert both(reference.tokenizer, template, dicts, {})[0] == render_chat(template, dicts, {})


@pytest.mark.parametrize(
    ("messages", "variables", "message"),
    [
        ("hi", {}, "a conversation is a list of messages"),
        (["hi"], {}, "a conversation is a list of messages"),
        ({"role": "user", "content": "hi"}, {}, "a conversation is a list of messages"),
        ([[USER]], {}, "a conversation is a list of messages"),
        (None, {}, "a conversation is a list of messages"),
        (5, {}, "a conversation is a list of messages"),
        ([USER], {"tools": [print]}, "tools must be a list of JSON objects"),
        ([USER], {"tools": "weather"}, "tools must be a list of JSON objects"),
        ([USER], {"documents": ["text"]}, "documents must be a list of JSON objects"),
    ],
)
def test_bad_conversations_are_refused(messages: Any, variables: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat("{{ messages }}{{ tools }}", messages, variables)


def test_a_conversation_may_begin_with_the_answer() -> None:
    assert render_chat("{% for m in messages %}{{ m }}{% endfor %}answer:", [], {}) == "answer:"
    with pytest.raises(InputError, match="the conversation is empty, so there is nothing to continue"):
        render_chat("{{ messages }}", [], {}, "content")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer_config.json", b"{", "is no JSON"),
        ("tokenizer_config.json", b"\xff", "is no readable text"),
        ("chat_template.jinja", b"\xff", "is no readable text"),
        ("chat_template.json", b"[" * 100_000, "is no JSON"),
    ],
)
def test_a_folder_with_damaged_files_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CaptureError, match=message):
        read_texts(tmp_path)
