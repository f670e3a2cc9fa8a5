"""``tokopt generate``: continue a prompt, or answer it as one message of a conversation."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tokopt.cli.generation import add_sampling, load_language_model, read_sampling
from tokopt.cli.options import add_artifact, add_backend, add_threads, natural, positive
from tokopt.cli.screen import Screen, si, warnings_said
from tokopt.cli.verb import FAILED, OK, Verb
from tokopt.errors import InputError

if TYPE_CHECKING:
    from tokopt.runtime import Generated, Grammar, LanguageModel, Sampling
    from tokopt.runtime.generate import Statistics
    from tokopt.runtime.prompts import Prompt


PROPOSED = 8
"""Nodes of every call's tree where it is checked that they change nothing."""

SAME = (None, "same_text", "greedy")
"""Rules with which a text is that of plain decoding."""


def add_options(parser: ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--stream", action="store_true", help="show the text as it comes")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message; use the chat template")
    parser.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="default: 128")
    parser.add_argument("--min-tokens", type=natural, default=0, metavar="N", help="do not end before")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="write N texts, and read the prompt once"
    )
    parser.add_argument(
        "--logprobs",
        type=natural,
        metavar="N",
        help="log-probability of every token, and the N likeliest in its place",
    )
    fitting = parser.add_mutually_exclusive_group()
    fitting.add_argument("--json-schema", metavar="FILE", help="write JSON that fits this schema")
    fitting.add_argument("--regex", metavar="PATTERN", help="write a text that fits this regular expression")
    fitting.add_argument(
        "--grammar", metavar="FILE", help="write a text that fits this grammar (Lark's syntax)"
    )
    add_sampling(parser)
    parser.add_argument(
        "--drafter",
        metavar="NAME",
        help="propose tokens to a model that verifies them (pass verify): suffix, prompt_lookup, token_recycling, "
        "hybrid, lookahead or logitspec",
    )
    parser.add_argument(
        "--accept",
        metavar="RULE",
        help="the rule that accepts them: same_text, greedy, deterministic, chain, with_replacement, "
        "without_replacement, k_seq, greedy_draft, typical or lantern (default: the text is as without a drafter)",
    )
    parser.add_argument(
        "--corpus",
        action="append",
        metavar="FILE",
        help="a text that the drafter suffix or hybrid knows beforehand",
    )
    parser.add_argument(
        "--check-lossless",
        action="store_true",
        help="write the text with and without speculation and compare it; exit code 1 where it differs",
    )
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Continue a prompt, or answer it as one message of a conversation."""
    from tokopt.runtime.sampling import word

    model = load_language_model(args)
    sampling = read_sampling(args)
    prompt = model.chat_prompt([{"role": "user", "content": args.prompt}]) if args.chat else args.prompt
    wanted: dict[str, Any] = {"max_tokens": args.max_tokens, "min_tokens": args.min_tokens, "stop": args.stop}
    wanted |= {"grammar": _grammar(args), "logprobs": args.logprobs}
    drafting = _drafting(model, args)
    if args.check_lossless:
        if args.samples is not None:
            raise InputError("--check-lossless compares one text with another; leave it or --samples out")
        sampling = replace(sampling, seed=word(sampling.seed))
        return check_lossless(model, prompt, sampling, wanted, screen, drafting)
    if args.samples is not None:
        if args.stream:
            raise InputError("--stream shows one text as it comes; leave it or --samples out")
        texts = model.generate(prompt, samples=args.samples, sampling=sampling, **wanted, **drafting)
        return _show_samples(model, texts, args.logprobs is not None, screen)
    stream = model.stream(prompt, sampling=sampling, **wanted, **drafting)
    with warnings_said():
        for piece in stream:
            if args.stream and not args.json:
                print(piece, end="", flush=True)
    text, done = stream.generated.text, stream.generated.statistics
    assert text is not None  # a model without a tokenizer has refused the prompt
    screen.line("" if args.stream else text)
    if args.logprobs is not None:
        _show_likelihoods(model, stream.generated, screen)
    speculates, kept = bool(drafting) or model.nodes is not None, stream.generated.lossless
    if sys.stderr.isatty() or speculates:
        print(_took(done, speculates), file=sys.stderr)
    if not kept.holds:
        print(f"tokopt: warning: not lossless: {kept.reason}", file=sys.stderr)
    screen.finish({"lossless": kept.holds, **_written(stream.generated), **numbers(done)})
    return OK


def _show_samples(model: LanguageModel, texts: Sequence[Generated], likelihoods: bool, screen: Screen) -> int:
    """Several texts, one after the other."""
    for place, done in enumerate(texts, 1):
        screen.line(f"--- {place} of {len(texts)}: {done.finish}")
        screen.line(done.text or "")
        if likelihoods:
            _show_likelihoods(model, done, screen)
    screen.finish({"texts": [_written(done) for done in texts], **numbers(texts[0].statistics)})
    return OK


def _show_likelihoods(model: LanguageModel, done: Generated, screen: Screen) -> None:
    """A table of the tokens of a text."""
    spell, tops = model.tokenizer.token, done.top_logprobs or [{}] * len(done.tokens)
    screen.table(
        ("token", "log-probability", "likeliest"),
        [
            (spell(token), own, ", ".join(f"{spell(other)} {x:.2f}" for other, x in top.items()))
            for token, own, top in zip(done.tokens, done.logprobs or (), tops, strict=True)
        ],
    )


def _written(done: Generated) -> dict[str, Any]:
    """A text, for programs."""
    found: dict[str, Any] = {"text": done.text, "tokens": done.tokens, "finish": done.finish}
    if done.logprobs is not None:
        found["logprobs"] = done.logprobs
    if done.top_logprobs is not None:
        found["top_logprobs"] = [{str(token): x for token, x in top.items()} for top in done.top_logprobs]
    return found


def _grammar(args: Namespace) -> Grammar | None:
    """What the text has to fit, if anything."""
    from tokopt.runtime import Grammar
    from tokopt.runtime.text import read_text

    for path, make in ((args.json_schema, Grammar.json_schema), (args.grammar, Grammar.lark)):
        if path is None:
            continue
        try:
            return replace(make(read_text(path)), name=path)
        except InputError as error:
            raise error if path in str(error) else InputError(f"{path}: {error}") from error
    return None if args.regex is None else Grammar.regex(args.regex)


def _drafting(model: LanguageModel, args: Namespace) -> dict[str, Any]:
    """The options of a text whose tokens this host proposes; none where it does not."""
    from tokopt.runtime.text import read_text

    if args.drafter is None:
        for option in ("accept", "corpus"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option} belongs to --drafter, for example --drafter suffix")
        return {}
    if args.corpus is None:
        return {"drafter": args.drafter, "accept": args.accept}
    corpus = [read_text(path) for path in args.corpus]
    return {"drafter": model.drafter(args.drafter, corpus=corpus, accept=args.accept), "accept": args.accept}


def check_lossless(
    model: LanguageModel,
    prompt: Prompt,
    sampling: Sampling,
    wanted: Mapping[str, Any],
    screen: Screen,
    drafting: Mapping[str, Any] | None = None,
) -> int:
    """Write a text with the whole tree in every call and with one node, and compare the tokens.

    ``drafting`` are the options of a text whose tokens the host proposes; without them the model does.
    """
    ways = _two_ways(model, drafting)
    sizes = (ways[0]["nodes"], 1)
    with screen.step("Writing the text with and without speculation"), warnings_said():
        for way in ways:  # the first calls allocate
            model.generate(prompt, sampling=sampling, max_tokens=min(wanted["max_tokens"], 8), **way)
        fast, plain = (model.generate(prompt, sampling=sampling, **wanted, **way) for way in ways)
    place = first_difference(fast.tokens, plain.tokens)
    took = (fast.statistics, plain.statistics)
    screen.table(
        ("nodes", "tokens", "calls", "tokens per call", "tokens/s"),
        [
            (n, done.new_tokens, done.decode_calls + 1, done.tokens_per_call, done.tokens_per_second)
            for n, done in zip(sizes, took, strict=True)
        ],
    )
    if place is None:
        screen.line(f"the same {len(fast.tokens)} tokens with and without speculation")
    else:
        pair = " and ".join(str(dict(enumerate(done.tokens)).get(place, "the end")) for done in (fast, plain))
        screen.line(f"the texts differ from new token {place} on: {pair}, with and without speculation")
    found = {"lossless": place is None, "first_difference": place, "text": fast.text}
    screen.finish(found | {"with": numbers(took[0]), "without": numbers(took[1])})
    return OK if place is None else FAILED


def _two_ways(
    model: LanguageModel, drafting: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a text with speculation, and of one without; raises InputError where they need not agree."""
    if not drafting:
        if model.nodes is None:
            raise InputError(
                f"{model.path} does not speculate by itself, so there is nothing to check; name a --drafter if it was "
                "made with the pass verify"
            )
        if not model.lossless.holds:
            raise InputError(
                f"{model.path} writes other texts than plain decoding does, since {model.lossless.reason}; make it "
                "without accept"
            )
        return {"nodes": model.nodes}, {"nodes": 1}
    if drafting["accept"] not in SAME:
        raise InputError(
            f"the rule {drafting['accept']} writes other texts than plain decoding does; leave --accept out"
        )
    return {**drafting, "nodes": PROPOSED}, {}


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts differ, the end of the shorter one if it begins the other; None where equal.

    >>> first_difference([5, 3, 8], [5, 4]), first_difference([5], [5, 4]), first_difference([5], [5])
    (1, 1, None)
    """
    for place, (left, right) in enumerate(zip_longest(one, other)):
        if left != right:
            return place
    return None


def numbers(done: Statistics) -> dict[str, Any]:
    """What a text took, for programs."""
    means = ("tokens_per_second", "tokens_per_call", "nodes_per_call")
    return asdict(done) | {name: getattr(done, name) for name in means}


def _took(done: Statistics, speculates: bool) -> str:
    """What a text took, for people."""
    gave = f", {done.tokens_per_call:.2f} tokens per call of {done.nodes_per_call:.1f} nodes" * speculates
    if done.drafting_seconds:
        gave += f", {done.drafting_seconds / done.decode_seconds:.0%} of the time drafting"
    return (
        f"{done.new_tokens} tokens in {done.decode_calls + 1} calls{gave}, {done.tokens_per_second:.1f} tokens/s, "
        f"prefill {1e3 * done.prefill_seconds:.0f} ms, cache {done.cache_slots} slots, {si(done.cache_bytes)}B"
    )


VERB = Verb(
    "continue a prompt with a language model",
    'tokopt generate smollm2.tokopt "Name three colours." --chat --stream',
    add_options,
    run,
)
