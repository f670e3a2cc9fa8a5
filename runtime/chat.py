"""A conversation as the text that a model was trained on, by its chat template.

What transformers' ``apply_chat_template`` renders is rendered alike: variables, filters, tags, functions and the choice
among named templates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tokopt.errors import InputError, MissingDependencyError

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}`` and whatever else the template reads."""

LONGEST = 2**16
"""Characters of the longest template; compiling one takes time that grows with its length."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message gives its reasoning, the one that templates read first."""

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of the message that the model continues; its space shows whether the template trims messages."""


def choose_template(templates: Mapping[str, str], name: str | None, tools: bool) -> str:
    """The template of this name; without a name ``tool_use`` if there are tools, else ``default``."""
    if not templates:
        raise InputError("this artifact has no chat template; pass the prompt as text")
    wanted = name or ("tool_use" if tools and "tool_use" in templates else "default")
    if wanted not in templates:
        raise InputError(
            f"there is no chat template {wanted!r}; name one of {', '.join(sorted(templates))} as template"
        )
    return templates[wanted]


def render_chat(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], continued: str | None = None
) -> str:
    """The text of a conversation by a Jinja template.

    ``variables`` are what the template may read beside ``messages``: ``add_generation_prompt``, ``tools``,
    ``documents``, ``bos_token`` and others; the first three are there in any case. ``continued`` names the part of the
    last message, usually ``content``, that the model is to continue: the text ends with it. Raises InputError when
    the template is damaged, rejects the conversation, or takes more memory or time than one needs.
    """
    try:
        import jinja2

        from tokopt.runtime.sandbox import render_template
    except ImportError as error:
        raise MissingDependencyError("chat templates need jinja2; run: pip install 'tokopt[text]'") from error
    if len(template) > LONGEST:
        raise InputError(f"the chat template has {len(template)} characters, at most {LONGEST} are allowed")
    try:
        conversation = _conversation(messages)
        end = _mark_end(conversation, continued) if continued else ""
        given = {"tools": None, "documents": None, "add_generation_prompt": False, **_plain(variables)}
        for name in ("tools", "documents"):
            _check_objects(name, given[name])
        if continued and given["add_generation_prompt"]:
            raise InputError(
                "an answer is either continued or begun; leave continued or add_generation_prompt out"
            )
        given["messages"] = conversation
        text = render_template(template, given)
    except InputError:
        raise
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template rejects the conversation: {_line(error)}") from error
    except Exception as error:  # a template may raise anything that Python raises, RecursionError for example
        raise InputError(
            f"the chat template fails on the conversation: {type(error).__name__}: {_line(error)}"
        ) from error
    return _cut(text, end) if continued else text


def _conversation(messages: object) -> list[dict[str, Any]]:
    """The messages of plain data, without keys that hold None, which templates take for text."""
    several = isinstance(messages, Iterable) and not isinstance(messages, (str, bytes, Mapping))
    plain: Any = _plain(list(cast(Iterable[Any], messages))) if several else None
    if not isinstance(plain, list) or not all(
        isinstance(message, dict) for message in cast(list[Any], plain)
    ):
        raise InputError(
            "a conversation is a list of messages, for example [{'role': 'user', 'content': 'Hi'}]"
        )
    found: list[dict[str, Any]] = []
    for message in cast(list[dict[str, Any]], plain):
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found


def _check_objects(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in cast(list[Any], value)):
        raise InputError(f"{name} must be a list of JSON objects, one for each of the {name}")


def _plain(value: Any) -> Any:
    """A value rebuilt of JSON's types alone, whose methods are known; anything else becomes the name of its type."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, an enumeration for example, the text itself
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in cast(Sequence[Any], value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # of a pydantic model
        return _plain(dump())
    return f"<{type(value).__name__}>"


def _mark_end(conversation: list[dict[str, Any]], name: str) -> str:
    """Write :data:`_TAG` behind the part of the last message that is to be continued, and return that part."""
    if not conversation:
        raise InputError("the conversation is empty, so there is nothing to continue; give a message")
    last = conversation[-1]
    value = last.get(name)
    names = [name]
    if name in _REASONING:  # reasoning stands under several names
        names = [other for other in _REASONING if last.get(other) == value]
    if isinstance(value, (list, tuple)):
        blocks: list[dict[str, Any]] = [
            block for block in cast(Sequence[Any], value) if isinstance(block, dict) and "text" in block
        ]
        if blocks:
            text = str(blocks[-1]["text"])
            blocks[-1]["text"] = text + _TAG
            return text
    elif isinstance(value, str):
        last.update(dict.fromkeys(names, value + _TAG))
        return value
    raise InputError(f"the last message has no text {name!r} to continue")


def _cut(text: str, end: str) -> str:
    """``text`` up to the mark, without the space around it if the template trimmed it."""
    at = text.rfind(_TAG.strip())
    if at < 0 or end.strip() not in text:
        raise InputError(
            "the chat template leaves the end of the last message out, so it cannot be continued"
        )
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


def _line(error: Exception) -> str:
    """What an error says, in one short line; a template may raise a text of any length."""
    text = " ".join(str(error)[:1000].split())
    return text if len(text) <= 300 else text[:297] + "..."
