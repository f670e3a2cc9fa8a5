"""``tokopt generate``: continue a prompt, or answer it as one message of a conversation."""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, Namespace

from tokopt.cli.options import add_artifact, add_backend, add_threads, positive
from tokopt.cli.screen import Screen, si
from tokopt.cli.verb import OK, Verb
from tokopt.errors import InputError


def add_options(parser: ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--stream", action="store_true", help="show the text as it comes")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message; use the chat template")
    parser.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="default: 128")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    for name, default, summary in (
        ("temperature", 0.0, "0 (the default) is greedy"),
        ("top-p", 1.0, "draw from the likeliest tokens of this mass"),
        ("min-p", 0.0, "draw from tokens this likely, relative to the likeliest"),
        ("typical-p", 1.0, "locally typical sampling: mass"),
        ("top-h", 0.0, "Top-H sampling: share of the entropy"),
        ("repetition-penalty", 1.0, "above 1: avoid tokens that were there before"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=summary)
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat the same draws")
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Continue a prompt, or answer it as one message of a conversation."""
    from tokopt.runtime import LanguageModel, Sampling, load

    model = load(args.artifact, threads=args.threads, backend=args.backend)
    if not isinstance(model, LanguageModel):
        raise InputError(f"{args.artifact} is no language model; run it with: tokopt run {args.artifact}")
    sampling = Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.typical_p,
        args.top_h,
        args.repetition_penalty,
        args.seed,
    )
    prompt = model.chat_prompt([{"role": "user", "content": args.prompt}]) if args.chat else args.prompt
    stream = model.stream(prompt, max_tokens=args.max_tokens, sampling=sampling, stop=args.stop)
    for piece in stream:
        if args.stream and not args.json:
            print(piece, end="", flush=True)
    text, done = stream.generated.text, stream.generated.statistics
    assert text is not None  # a model without a tokenizer has refused the prompt
    screen.line("" if args.stream else text)
    if sys.stderr.isatty():
        print(
            f"{done.new_tokens} tokens in {done.decode_calls + 1} calls, {done.tokens_per_second:.1f} tokens/s, "
            f"prefill {1e3 * done.prefill_seconds:.0f} ms, cache {done.cache_slots} slots, {si(done.cache_bytes)}B",
            file=sys.stderr,
        )
    screen.finish({"text": text, **dataclasses.asdict(done), "tokens_per_second": done.tokens_per_second})
    return OK


VERB = Verb(
    "continue a prompt with a language model",
    'tokopt generate smollm2.tokopt "Name three colours." --chat --stream',
    add_options,
    run,
)
