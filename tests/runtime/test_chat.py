"""Conversations become text by a template that is not trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from tests.runtime.toys import VOCABULARY, save, toy, with_file
from tokopt.errors import InputError
from tokopt.runtime import Generation, LanguageModel, load
from tokopt.runtime.chat import LONGEST, render_chat

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_chat_template() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} >{% endif %}"
    )
    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    assert render_chat(template, MESSAGES, variables) == "<s>[user] Hi >"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "rejects the conversation: roles must alternate"),
        ("{% for %}", "rejects the conversation: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "rejects the conversation: access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "fails on the conversation: ZeroDivisionError: division by zero"),
        ("{{ 'a' * 10**9 }}", "makes a value of more than [0-9]+ characters"),
        ("a" * (LONGEST + 1), f"has {LONGEST + 1} characters, at most {LONGEST} are allowed"),
    ],
)
def test_chat_template_faults(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat(template, MESSAGES, {})


def test_the_limits_grow_with_the_conversation() -> None:
    """What a template does to every message is never too much, however long and however many they are."""
    template = """
        {%- macro show(m) %}{{ m.role | upper ~ ': ' ~ m.content | trim | replace('a', 'bb') }}{% endmacro %}
        {%- for m in messages[::-1] %}
            {%- set last = messages | length - 1 == loop.index0 or messages is string %}
            {%- if (messages[0] != m or loop.last) and m.content.split(' ') | length > 1 %}{{ show(m) }}{% endif %}
            {{- m | tojson(indent=4) }}{{ m.content[10:] in m.content }}{{ (messages | first).role if not last }}
        {%- endfor %}"""
    for count, length in ((4, 250_000), (2000, 10)):
        long = [{"role": "user", "content": f"{i} " + "abc " * length} for i in range(count)]
        assert len(render_chat(template, long, {})) > 9 * count * length


LETTERS = "?Hi>fdb<42F"
END = len(LETTERS)


def ids(text: str) -> list[int]:
    return [max(LETTERS.find(letter), 0) for letter in text]


def opened(folder: Path, generation: Generation) -> LanguageModel:
    """A toy with a tokenizer of one token per letter, and ``<end>`` behind them."""
    library: Any = Library(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, "?"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(["<end>"])
    path = save(folder / "toy.tokopt", replace(toy(), generation=generation))
    with_file(path, "tokenizer", "tokenizer.json", library.to_str().encode())
    return load(path, threads=1)


def test_a_model_renders_with_its_own_templates_and_special_tokens(tmp_path: Path) -> None:
    named = {"tool_use": "{{ tools[0].name }}", "rag": "{{ documents[0].text }}{{ bos_token }}{{ answer }}"}
    usual = "{{ eos_token }}{{ messages[0].content }}{{ '>' if add_generation_prompt }}"
    special = {"bos_token": "<b>", "eos_token": "<end>"}
    model = opened(tmp_path, Generation(64, VOCABULARY, (5,), 4, usual, named, special))
    assert model.chat_prompt(MESSAGES) == [END, *ids("Hi>")]
    assert model.chat_prompt(MESSAGES, add_generation_prompt=False) == [END, *ids("Hi")]
    assert model.chat_prompt(MESSAGES, continued="content") == [END, *ids("Hi")]
    assert model.chat_prompt(MESSAGES, tools=[{"name": "f"}]) == ids("f")
    documents = [{"text": "d"}]
    found = model.chat_prompt(MESSAGES, template="rag", documents=documents, answer=42)
    assert found == ids("d<b>42")
    with pytest.raises(InputError, match="no chat template 'other'; name one of default, rag, tool_use"):
        model.chat_prompt(MESSAGES, template="other")


def test_special_tokens_that_nothing_names_are_spelled_by_their_ids(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ eos_token is defined }}"
    model = opened(tmp_path, Generation(64, VOCABULARY, (), 4, template))
    assert model.chat_prompt(MESSAGES) == ids("fFalse")


def test_a_model_without_a_template_takes_text(tmp_path: Path) -> None:
    model = opened(tmp_path, Generation(64, VOCABULARY))
    with pytest.raises(InputError, match="has no chat template; pass the prompt as text"):
        model.chat_prompt(MESSAGES)
