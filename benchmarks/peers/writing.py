"""What other engines write after a prompt, greedily, and what that takes: peers of :mod:`benchmarks.speculate`.

llama.cpp and OpenVINO GenAI read the same GGUF file, onnxruntime-genai a model that its builder wrote in 4 bits. The
first two look tokens up in the prompt, too: ten at a time, as their packages and documentation propose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.language import genai_maker, llama_model, openvino_pipeline, prepare
from benchmarks.timing import Engine
from examples.data import cache_folder

LONGEST = 2048
"""Tokens of a prompt and of what is written after it, at most."""

LOOKUP = 10
"""Tokens that are looked up at once."""

Answer = Callable[[list[int], int], dict[str, Any]]
"""Token ids of a prompt and the most new tokens -> the seconds behind the first of these, and all of them."""


def folder() -> Path:
    """What the engines read; it is made where it is absent."""
    made = cache_folder() / "benchmark-peers" / "language"
    prepare(made)
    return made


def open_peer(name: str, path: Path, threads: int) -> Answer:
    """The engine of a name, on what :func:`folder` holds."""
    _, file, opened = PEERS[name]
    return opened(Engine(name, "", path / file, 1, LONGEST, threads))


def _llama(engine: Engine, **options: Any) -> Answer:
    model = llama_model(engine, **options)
    stops = {model.token_eos(), *model.tokenize(b"<|im_end|>", add_bos=False, special=True)}

    def answer(ids: list[int], most: int) -> dict[str, Any]:
        tokens: list[int] = []
        start = 0.0
        for token in model.generate(ids, temp=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
            start = start or time.perf_counter()
            tokens.append(token)
            if len(tokens) == most or token in stops:
                break
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer


def _llama_lookup(engine: Engine) -> Answer:
    speculative: Any = import_module("llama_cpp.llama_speculative")
    drafts = speculative.LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP)
    return _llama(engine, draft_model=drafts, logits_all=True)


def _genai(engine: Engine) -> Answer:
    make = genai_maker(engine)

    def answer(ids: list[int], most: int) -> dict[str, Any]:
        generator = make()
        generator.append_tokens(np.array([ids], np.int32))
        generator.generate_next_token()
        start, count = time.perf_counter(), 1
        while count < most and not generator.is_done():
            generator.generate_next_token()
            count += 1
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": generator.get_sequence(0)[len(ids) :].tolist()}

    return answer


def _openvino(engine: Engine, **lookup: int) -> Answer:
    genai: Any = import_module("openvino_genai")
    openvino: Any = import_module("openvino")
    pipeline = openvino_pipeline(engine, **({"prompt_lookup": True} if lookup else {}))

    def answer(ids: list[int], most: int) -> dict[str, Any]:
        config = pipeline.get_generation_config()
        config.max_new_tokens, config.do_sample = most, False
        for name, value in lookup.items():
            setattr(config, name, value)
        prompt = np.array([ids])
        given = openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt))
        done = pipeline.generate(genai.TokenizedInputs(*given), config)
        took = done.perf_metrics
        seconds = (took.get_generate_duration().mean - took.get_ttft().mean) / 1e3
        return {"seconds": seconds, "tokens": list(done.tokens[0])}

    return answer


def _openvino_lookup(engine: Engine) -> Answer:
    return _openvino(engine, num_assistant_tokens=LOOKUP, max_ngram_size=3)


PEERS: Mapping[str, tuple[str, str, Callable[[Engine], Answer]]] = {
    "llama.cpp": ("llama_cpp", "model.gguf", _llama),
    "llama.cpp with lookup": ("llama_cpp", "model.gguf", _llama_lookup),
    "onnxruntime-genai, int4": ("onnxruntime_genai", "genai", _genai),
    "OpenVINO GenAI": ("openvino_genai", "model.gguf", _openvino),
    "OpenVINO GenAI with lookup": ("openvino_genai", "model.gguf", _openvino_lookup),
}
"""Name in the tables -> its module, what it reads, and how it is opened."""


def installed() -> list[str]:
    """The engines whose packages there are."""
    return [name for name, (module, _, _) in PEERS.items() if find_spec(module)]
