"""Conversations become text by a template that is not trusted."""

from __future__ import annotations

import pytest

from tokopt.errors import InputError
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
    """What a template does to every message is never too much, however long they are."""
    template = """
        {%- macro show(m) %}{{ m.role | upper ~ ': ' ~ m.content | trim | replace('a', 'bb') }}{% endmacro %}
        {%- for m in messages %}
            {%- if messages[loop.index0 - 1] != m and m.content.split(' ') | length > 1 %}{{ show(m) }}{% endif %}
            {{- m | tojson(indent=4) }}{{ m.content[:10] in m.content }}
        {%- endfor %}"""
    long = [{"role": "user", "content": f"{i} " + "abc " * 2500} for i in range(400)]
    assert len(render_chat(template, long, {})) > 8_000_000
