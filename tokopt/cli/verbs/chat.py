"""``tokopt chat``: a conversation in the terminal, whose past stays in the cache."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tokopt.cli.generation import add_sampling, load_language_model, read_sampling
from tokopt.cli.options import add_artifact, add_backend, add_threads, positive
from tokopt.cli.screen import Screen, warnings_said
from tokopt.cli.verb import BAD_INPUT, OK, Verb
from tokopt.errors import InputError, TokoptError

if TYPE_CHECKING:
    from tokopt.runtime import Chat, Sampling

HELP = """/rewind [N]   forget your last N messages and their answers (default: 1)
/save FILE    write the conversation and its cache, for tokopt chat --open FILE
/help         show these lines
/quit         end; so does the end of the input"""


def add_options(parser: ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    parser.add_argument("--open", metavar="FILE", help="go on with a conversation that was saved")
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="default: 512")
    add_sampling(parser)
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Answer every line of the input, until it ends.

    A line that cannot be done is said, and the next one is read; where nobody types, the exit code says it, too.
    """
    model = load_language_model(args)
    if args.open is not None and args.system is not None:
        raise InputError("a conversation that was saved has begun already; leave --system or --open out")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    chat = model.chat(system) if args.open is None else model.open_chat(args.open)
    sampling = read_sampling(args)
    if sys.stdin.isatty():
        screen.line("Type a message; /help lists what else there is, /quit ends.")
    code = OK
    for line in _lines():
        if line == "/quit":
            break
        try:
            if line.startswith("/"):
                screen.line(_command(chat, line))
            elif line:
                _answer(chat, line, args.max_tokens, sampling, screen)
        except TokoptError as error:
            if args.traceback:
                raise
            if sys.stdin.isatty():
                screen.line(f"tokopt: {error}")
                continue
            print(f"tokopt: error: {error}", file=sys.stderr)
            code = BAD_INPUT
    screen.finish({"messages": chat.messages, "tokens": len(chat.tokens)})
    return code


def _lines() -> Iterator[str]:
    """What is typed, line by line; Ctrl-C and Ctrl-D end it."""
    ask = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(ask).strip()
        except (EOFError, KeyboardInterrupt):
            return


def _answer(chat: Chat, message: str, most: int, sampling: Sampling, screen: Screen) -> None:
    """Show an answer as it comes; Ctrl-C ends it early."""
    with warnings_said():
        try:
            for piece in chat.stream(message, max_tokens=most, sampling=sampling):
                if not screen.as_json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        screen.line()


def _command(chat: Chat, line: str) -> str:
    """Do what a line that begins with a slash says, and tell what was done."""
    name, _, value = line.partition(" ")
    known: dict[str, Callable[[str], str]] = {
        "/help": lambda _: HELP,
        "/rewind": lambda turns: _rewind(chat, turns.strip() or "1"),
        "/save": lambda path: _save(chat, path.strip()),
    }
    if name not in known:
        raise InputError(f"there is no command {name}; /help lists those there are")
    return known[name](value)


def _rewind(chat: Chat, turns: str) -> str:
    if not turns.isdecimal():
        raise InputError(f"{turns!r} is no number of turns; write /rewind 1")
    chat.rewind(int(turns))
    return f"{len(chat.messages)} messages left"


def _save(chat: Chat, path: str) -> str:
    if not path:
        raise InputError("name the file: /save talk.chat")
    chat.save(path)
    return f"{path}: {len(chat.tokens)} tokens"


VERB = Verb(
    "talk with a language model",
    'tokopt chat smollm2.tokopt --system "Answer briefly."',
    add_options,
    run,
)
