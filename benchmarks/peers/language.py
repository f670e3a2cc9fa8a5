"""SmolLM2-135M-Instruct on every engine: the prompt, then one token at a time.

A call decodes :data:`benchmarks.decode.TOKENS` tokens after a prompt that was read before and is gone back to every
time. OpenVINO GenAI cannot go back: its calls read the prompt too, and what counts is the time per token that it
reports itself. Reading is timed from an empty cache to the first logits. All engines get the same token ids.

Fidelity is the KL divergence of an engine's next token from that of the float32 model, on the texts by which
:mod:`benchmarks.quantize` judges: those that calibration has not seen.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.decode import TOKENS, _load, _prompt
from benchmarks.timing import Engine

MODEL = "SmolLM2-135M-Instruct"
PROMPTS = (64, 1024)

PEERS: Mapping[str, tuple[str, str]] = {
    "llama.cpp, the file's 4 bits": ("llama.cpp", "model.gguf"),
    "onnxruntime-genai, int4": ("genai", "genai"),
    "OpenVINO GenAI, from the file": ("openvino-genai", "model.gguf"),
    "transformers": ("transformers", "hf"),
}
"""Name in the tables -> kind of engine, and what it reads; the first is what the others are compared with."""

QUICK_READER = "onnxruntime-genai, int4"
"""What readers are compared with: the first takes seconds, in which the machine changes."""

METHODS = (
    "float32",
    "rtn, 8 bits",
    "rtn, 8 bits, 8-bit cache",
    "rtn, symmetric",
    "gptq, ordered",
    "gptq, 4.5 bits",
    "keep_grid",
    "keep_grid, 8-bit cache",
)
"""tokopt's artifacts, by their names in :mod:`benchmarks.quantize`; symmetric 4 bits are what onnxruntime-genai has."""


def engines(folder: Path, size: int, threads: int, reading: bool) -> dict[str, Engine]:
    """Every engine by name, to decode after ``size`` tokens, or to read them."""
    from benchmarks.quantize import artifact

    suffix = "-read" if reading else ""
    made = {
        name: Engine(name, f"{kind}{suffix}", folder / file, 1, size, threads)
        for name, (kind, file) in PEERS.items()
    }
    for method in METHODS:
        kind = "tokopt-read" if reading else "step"
        path = artifact(MODEL, method)
        made[f"tokopt {method}"] = Engine(f"tokopt {method}", kind, path, 1, size, threads)
    return {QUICK_READER: made.pop(QUICK_READER), **made} if reading else made


def prepare(folder: Path) -> None:
    """What the peers read."""
    import subprocess
    import sys

    from examples.data import smollm2, smollm2_gguf

    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("hf", smollm2()), ("model.gguf", smollm2_gguf())):
        if not (folder / name).exists():
            (folder / name).symlink_to(target)
    if not (folder / "genai").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder / "hf", "-o"]
        command += [folder / "genai", "-p", "int4", "-e", "cpu", "-c", folder / "work"]
        subprocess.run([*command, "--extra_options", "int4_accuracy_level=4"], check=False)


# --- fidelity ---------------------------------------------------------------------------------------------


def fidelity(engine: Engine, wanted: list[Any]) -> dict[str, float]:
    """KL divergence from the wanted logits, share of equal first choices, and perplexity."""
    from benchmarks import quantize

    if engine.kind == "step":
        got = quantize.outputs(MODEL, engine.name.removeprefix("tokopt "), engine.threads)
    else:
        readers = {"llama.cpp": llama_logits, "genai": genai_logits, "openvino-genai": openvino_logits}
        read = readers[engine.kind](engine)
        got = [read(text) for text in judged_texts()]
    return quantize.quality(MODEL, wanted, got)


def reference(threads: int) -> list[Any]:
    """The float32 model's logits."""
    from benchmarks import quantize

    return quantize.outputs(MODEL, "float32", threads)


def judged_texts() -> list[list[int]]:
    """Token ids of every text."""
    from benchmarks import quantize
    from tokopt.runtime import load

    return quantize.texts(load(quantize.artifact(MODEL, "float32")))[1::2]


Read = Callable[[list[int]], NDArray[np.float32]]
"""Token ids to the logits [tokens, vocabulary] after each."""


def llama_logits(engine: Engine) -> Read:
    """All logits of one evaluation."""
    model = llama_model(engine, logits_all=True)

    def read(ids: list[int]) -> NDArray[np.float32]:
        model.reset()
        model.eval(ids)
        return model.scores[: len(ids)].copy()

    return read


def genai_logits(engine: Engine) -> Read:
    """The model that the builder wrote, by ONNX Runtime itself and with an empty cache."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = engine.threads
    session = onnxruntime.InferenceSession(
        engine.artifact / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    decoder = json.loads((engine.artifact / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)

    def read(ids: list[int]) -> NDArray[np.float32]:
        feed = {given.name: empty for given in session.get_inputs()}
        feed |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        return np.asarray(session.run(["logits"], feed)[0])[0]

    return read


def openvino_logits(engine: Engine) -> Read:
    """The model that the pipeline makes of the file, by OpenVINO itself."""
    import openvino

    openvino_genai: Any = importlib.import_module("openvino_genai")

    saved = engine.artifact.parent / "openvino_model.xml"
    if not saved.exists():
        openvino_genai.LLMPipeline(str(engine.artifact), "CPU", {"enable_save_ov_model": True})
    settings = {"INFERENCE_NUM_THREADS": engine.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(saved, "CPU", settings).create_infer_request()

    def read(ids: list[int]) -> NDArray[np.float32]:
        request.reset_state()
        feed = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return request.infer(feed)["logits"][0].copy()

    return read


# --- transformers -----------------------------------------------------------------------------------------


def transformers_call(engine: Engine) -> Callable[[], object]:
    """Greedy decoding with a cache that is cut back."""
    import torch

    model, read = _transformers(engine)
    first, cache = read(torch.from_numpy(_prompt(engine)))

    @torch.no_grad()
    def call() -> None:
        token = first
        for _ in range(TOKENS):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.crop(-TOKENS)

    return call


def transformers_read(engine: Engine) -> Callable[[], object]:
    """The prompt, from an empty cache."""
    import torch

    _, read = _transformers(engine)
    prompt = torch.from_numpy(_prompt(engine))
    return lambda: read(prompt)


def _transformers(engine: Engine) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(engine.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(engine.artifact, dtype=torch.float32).eval()

    @torch.no_grad()
    def read(tokens: Any) -> tuple[Any, Any]:
        cache = DynamicCache(config=model.config)
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1), cache

    return model, read


# --- llama.cpp --------------------------------------------------------------------------------------------


def llama_call(engine: Engine) -> Callable[[], object]:
    """Decoding after the prompt; what lies behind it in the cache is dropped by the next evaluation."""
    model = llama_model(engine)
    model.eval(_prompt(engine)[0].tolist())
    first = _likeliest(model)

    def call() -> None:
        model.n_tokens, token = engine.size, first
        for _ in range(TOKENS):
            model.eval([token])
            token = _likeliest(model)

    return call


def llama_read(engine: Engine) -> Callable[[], object]:
    """The prompt, from an empty cache."""
    model, prompt = llama_model(engine), _prompt(engine)[0].tolist()

    def call() -> None:
        model.reset()
        model.eval(prompt)

    return call


def _likeliest(model: Any) -> int:
    pointer = model._ctx.get_logits()
    return int(np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),)).argmax())


def llama_model(engine: Engine, **options: Any) -> Any:
    """The file of an engine by llama.cpp's package for Python."""
    llama_cpp: Any = importlib.import_module("llama_cpp")

    # Without this, repacked kernels are chosen that some virtual machines announce and do not have.
    original = llama_cpp.llama_model_default_params

    def parameters() -> Any:
        made = original()
        made.use_extra_bufts = False
        return made

    llama_cpp.llama_model_default_params = parameters
    llama_cpp.llama_cpp.llama_model_default_params = parameters
    return llama_cpp.Llama(
        str(engine.artifact),
        n_ctx=engine.size + TOKENS + 8,
        n_batch=512,
        n_threads=engine.threads,
        n_threads_batch=engine.threads,
        verbose=False,
        **options,
    )


# --- onnxruntime-genai ------------------------------------------------------------------------------------


def genai_call(engine: Engine) -> Callable[[], object]:
    """Decoding after the prompt, gone back to by ``rewind_to``."""
    generator = _genai(engine)
    generator.append_tokens(_prompt(engine).astype(np.int32))

    def call() -> None:
        for _ in range(TOKENS):
            generator.generate_next_token()
        generator.rewind_to(engine.size)

    return call


def genai_read(engine: Engine) -> Callable[[], object]:
    """The prompt, by a new generator."""
    prompt = _prompt(engine).astype(np.int32)
    make = genai_maker(engine)
    return lambda: make().append_tokens(prompt)


def _genai(engine: Engine) -> Any:
    return genai_maker(engine)()


def genai_maker(engine: Engine) -> Callable[[], Any]:
    """What makes generators, each with an empty cache."""
    genai: Any = importlib.import_module("onnxruntime_genai")

    config = genai.Config(str(engine.artifact))
    options = {"intra_op_num_threads": engine.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)

    def make() -> Any:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=engine.size + 2 * TOKENS + 8, do_sample=False)
        return genai.Generator(model, options)

    return make


# --- OpenVINO GenAI ---------------------------------------------------------------------------------------


def openvino_call(engine: Engine) -> Callable[[], float]:
    """The time per token that the pipeline reports, times the tokens of a call."""
    run = _openvino_genai(engine, TOKENS + 1)
    return lambda: run().get_tpot().mean / 1e3 * TOKENS


def openvino_read(engine: Engine) -> Callable[[], float]:
    """The time to the first token that the pipeline reports."""
    run = _openvino_genai(engine, 1)
    return lambda: run().get_ttft().mean / 1e3


def _openvino_genai(engine: Engine, new: int) -> Callable[[], Any]:
    import openvino

    openvino_genai: Any = importlib.import_module("openvino_genai")

    pipeline = openvino_pipeline(engine)
    prompt, config = _prompt(engine), openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True)

    def run() -> Any:
        prompt[0, 0] += 1  # a prompt that it knows already would not be read again
        given = openvino.Tensor(prompt.copy()), openvino.Tensor(np.ones_like(prompt))
        return pipeline.generate(openvino_genai.TokenizedInputs(*given), config).perf_metrics

    return run


def openvino_pipeline(engine: Engine, **options: Any) -> Any:
    """The file of an engine by OpenVINO GenAI, in float32."""
    openvino_genai: Any = importlib.import_module("openvino_genai")

    settings = {"INFERENCE_NUM_THREADS": engine.threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino_genai.LLMPipeline(str(engine.artifact), "CPU", {**settings, **options})


# --- tokopt -----------------------------------------------------------------------------------------------


def tokopt_read(engine: Engine) -> Callable[[], object]:
    """The prompt, from an empty cache."""
    model, prompt = _load(engine), _prompt(engine).tolist()

    def call() -> None:
        model.open(1, engine.size + 1).prefill(prompt)

    return call
