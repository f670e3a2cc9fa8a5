"""Arguments of the runtime: sampling, prompts, options of generation, conversations, arrays, loading."""

from __future__ import annotations

import datetime
import math
from typing import Any, cast

import numpy as np
import torch

from tests.faults.cases import Argument, Call
from tests.runtime.toys import VOCABULARY
from tokopt.runtime import Generation, Grammar, Sampling, load

CONTEXT = 64
"""Of the toy that speaks."""

BIG, NAN, INF = 2**70, math.nan, math.inf
IDS, X = np.array([3, 4, 5]), np.arange(6, dtype=np.float32).reshape(2, 3)

NO_NUMBERS: list[Any] = ["0.5", None, [0.5], (0.5,), np.array([0.5]), 1j, {}, b"1", torch.ones(1), object()]
NO_NUMBERS += [NAN, INF, -INF, np.float32(NAN), 10**400]
NO_COUNTS: list[Any] = ["5", None, [3], np.array([3]), 1j, {}, b"1", 1.5, 2.0, np.float64(3), NAN, INF, -1]

NO_PROMPTS: list[Any] = [
    "",
    None,
    5,
    5.0,
    b"x",
    bytearray(b"x"),
    memoryview(b"\1"),
    {3},
    {3: 4},
    (),
    object(),
]
NO_PROMPTS += [iter([3]), [], [NAN], [1.5], [5.0, 6], [None], ["a", 5], [5, "a"], [5, [6]], [-1], [BIG]]
NO_PROMPTS += [
    [VOCABULARY],
    [True, 5],
    [np.float32(5)],
    [np.bool_(True)],
    [datetime.date(2020, 1, 1)],
    [[[5]]],
]
NO_PROMPTS += [np.array([1.5]), np.array([True]), np.array(5), np.array([]), np.array([1j]), np.array([b"a"])]
NO_PROMPTS += [np.array([2**64 - 1]), np.array([3], "M8[s]"), "\ud800", "a\udfff", "a" * (CONTEXT + 1)]
NO_PROMPTS += [[5] * (CONTEXT + 1), [[[[[5]]]]], torch.tensor([1.5]), torch.tensor(5), torch.tensor([True])]
NO_PROMPTS += [torch.tensor([1.0], dtype=torch.bfloat16)]

NO_BATCHES: list[Any] = [[[]], [[5], []], [[5], ""], ["", "a"], [[5], None], [[5], [6, [7]]], [[5], [5.5]]]
NO_BATCHES += [[["a"]], [[True]], [b"a"], [{5}], [[5], {6: 7}], np.array([[1.5]]), np.array([[True]])]
NO_BATCHES += [np.zeros((2, 0)), torch.ones(2, 2), [[5] * (CONTEXT + 1), [5]], np.zeros((1, 1, 1), int)]
NO_BATCHES += [["a", "\ud800"]]
"""Several prompts, one of which is none."""

NO_SINGLES: list[Any] = [
    ["5"],
    ["a", "b"],
    [[5]],
    [[5], [6]],
    np.array([[5]]),
    [(5,)],
    [IDS],
    torch.tensor([[1]]),
]
"""Several prompts where one is taken."""

PROMPTS: list[Any] = ["a", "a\0b", "🙂", np.str_("ab"), "5", "a" * (CONTEXT - 1), [5], (3, 4), range(3), IDS]
PROMPTS += [[5] * (CONTEXT - 1), IDS.astype(np.int32), IDS.astype(np.uint8), IDS.astype(">i8"), IDS[::-1]]
PROMPTS += [IDS.astype(object), list(IDS), torch.tensor([3, 4]), torch.tensor([3, 4], dtype=torch.int32)]

BATCHES: list[Any] = [["a", "b"], ["5"], ["a", [5]], [[5], [6, 7]], [IDS], [(5,), range(2)], ("a", "b")]
BATCHES += [np.array([[5], [6]]), np.array(["a", "b"]), torch.tensor([[3, 4]]), [torch.tensor([3, 4])]]

MEMORY = memoryview(cast(Any, X))

NO_IMAGES: list[Any] = [X.astype(kind) for kind in ("f8", "f2", "u1", "?", "c8", "O", "U", "M8[s]", "g")]
NO_IMAGES += [None, X.tolist(), X * NAN, X - INF, X[:0], X[:, :2], X[0], X[None], np.ones((5, 3), np.float32)]
NO_IMAGES += [[[1.0], [1.0, 2.0]], "images", b"images", {}, iter(X), object(), np.float32(1), 5]
NO_IMAGES += [torch.ones(2, 3).double(), torch.ones(2, 3).bfloat16(), torch.ones(3)]

IMAGES: list[Any] = [X, np.asfortranarray(X), X[::-1], X[:, ::-1], X.astype(">f4"), MEMORY, list(X)]
IMAGES += [X * np.float32(1e-45), np.full_like(X, 3e38), np.broadcast_to(X[:1], (4, 3))]
IMAGES += [np.frombuffer(X.tobytes(), np.float32).reshape(2, 3)]  # read-only
IMAGES += [torch.ones(2, 3), torch.ones(2, 3, requires_grad=True), torch.ones(3, 2).T]


USER = {"role": "user", "content": "a"}


def option(name: str) -> Call:
    """A field of :class:`Sampling`."""
    return lambda stage, value: Sampling(**{name: value})


def spoken(name: str) -> Call:
    """A keyword of ``generate``."""

    def call(stage: Any, value: Any) -> object:
        options: dict[str, Any] = {"max_tokens": 1, name: value}
        return stage.speaker.generate("a", **options)

    return call


def loaded(name: str) -> Call:
    """A keyword of ``load``."""
    return lambda stage, value: load(stage.encoder.path, **{name: value})


SAMPLING = {
    "temperature": Argument(
        option("temperature"),
        [*NO_NUMBERS, -1, -1e-9],
        [0, 1, 1e-300, 1e300, True, np.array(0.5), np.float32(0.5), np.int64(1), torch.tensor(0.5)],
    ),
    **{
        name: Argument(option(name), [*NO_NUMBERS, 0, -1, 2, 1e300], [1, 1e-300, True, np.array(0.5)])
        for name in ("top_p", "typical_p")
    },
    **{
        name: Argument(option(name), [*NO_NUMBERS, -1, 2, 1e300], [0, 1, 1e-300, True, np.float32(0.5)])
        for name in ("min_p", "top_h")
    },
    "repetition_penalty": Argument(
        option("repetition_penalty"), [*NO_NUMBERS, 0, -0.1], [2, 1e-300, 1e300, True, np.array(0.5)]
    ),
    "top_k": Argument(option("top_k"), NO_COUNTS, [0, 1, 10**9, BIG, True, np.int64(3), np.array(3)]),
    "logit_bias": Argument(
        option("logit_bias"),
        [
            5,
            "a",
            [1],
            None,
            {"a": 1},
            {-1: 1.0},
            {1.5: 1},
            {1: "a"},
            {1: NAN},
            {1: INF},
            {1: None},
            {True: [1]},
        ],
        [{}, {1: 2}, {np.int64(1): np.float32(2)}, {0: -INF}, ()],
    ),
    "seed": Argument(
        option("seed"),
        [value for value in NO_COUNTS if value is not None] + [[1, 2], "seed", np.random.default_rng(0)],
        [None, 0, 2**64, 2**200, True, np.int64(3)],
    ),
}

PROMPT = {
    "generate": Argument(
        lambda stage, value: stage.speaker.generate(value, max_tokens=1),
        NO_PROMPTS + NO_BATCHES,
        PROMPTS + BATCHES,
    ),
    "stream": Argument(
        lambda stage, value: stage.speaker.stream(value, max_tokens=1), NO_PROMPTS + NO_SINGLES, PROMPTS
    ),
    "tokens": Argument(
        lambda stage, value: stage.speaker.tokens(value, max_tokens=1), NO_PROMPTS + NO_SINGLES, PROMPTS
    ),
    "score": Argument(lambda stage, value: stage.speaker.score(value), NO_PROMPTS + NO_SINGLES, PROMPTS),
}


def keep(history: object, logits: np.ndarray) -> np.ndarray:
    return logits


SPEAKER = {
    "max_tokens": Argument(
        spoken("max_tokens"), NO_COUNTS, [0, 1, BIG, np.int64(3), np.uint8(3), np.array(3), True]
    ),
    "stop": Argument(
        spoken("stop"),
        [5, [b"a"], [None], [["a"]], b"a", {"a": 1}, ["a", 5], iter(["a"]), True],
        ["", "a", "abc", None, ["", ""], ("x",), {"x"}, ["\ud800"], ["a" * 10_000], []],
    ),
    "sampling": Argument(
        spoken("sampling"),
        ["greedy", {}, 0, [], {"temperature": 1.0}, Sampling, 0.7],
        [None, Sampling(0.5), Sampling(seed=3)],
    ),
    "processors": Argument(
        spoken("processors"), [5, [5], "ab", [None], {}, keep, [keep, 5]], [None, (), [keep], (keep,)]
    ),
    "min_tokens": Argument(
        lambda stage, value: stage.speaker.generate("a", max_tokens=BIG, stop="", min_tokens=value),
        [value for value in NO_COUNTS if value != BIG],
        [0, np.int64(0)],
    ),
    "generate(samples": Argument(
        lambda stage, value: stage.speaker.generate("a", max_tokens=1, samples=value),
        [value for value in NO_COUNTS if value is not None] + [0],
        [None, 1, 3, np.int64(2), True],
    ),
    "logprobs": Argument(
        spoken("logprobs"),
        [value for value in NO_COUNTS if value is not None] + [10**9],
        [None, 0, 2, np.int64(1)],
    ),
    "grammar": Argument(spoken("grammar"), [5, "a+", {}, {"type": "integer"}, [], Grammar], [None]),
    "nodes": Argument(spoken("nodes"), [0, 1, 8, 1.5, "8", [8], True, NAN], [None]),  # it does not speculate
    "inputs": Argument(spoken("inputs"), [5, [], "images", {"images": X}, [X], X], [None, {}]),
    "chat_prompt": Argument(
        lambda stage, value: stage.speaker.chat_prompt(value),
        [
            "hi",
            None,
            5,
            {"role": "user", "content": "a"},
            ["hi"],
            [5],
            [None],
            [["user", "a"]],
            b"hi",
            [b"hi"],
        ]
        + [[{"role": "user", "content": "\ud800"}]],
        [[], [{"role": "user", "content": "a"}], [{"content": "a"}], ({"role": "user", "content": None},)]
        + [[{"role": "wizard", "content": "a"}], [{"role": "user", "content": [{"type": "text"}]}]],
    ),
    **{
        f"chat_prompt({name}": Argument(
            lambda stage, value, name=name: stage.speaker.chat_prompt([USER], **{name: value}), bad, good
        )
        for name, bad, good in (
            ("template", ["nope", 5, b"default", ["default"], {}], [None, "default"]),
            ("continued", ["nope", 5, b"content", ["content"], {}], [None, "content"]),
            ("tools", ["weather", 5, [5], [print], {"a": 1}], [None, [], [{"type": "function"}]]),
            ("documents", ["text", 5, ["text"]], [None, [{"title": "A"}]]),
        )
    },
    "open(batch": Argument(
        lambda stage, value: stage.speaker.open(value, 4), [*NO_COUNTS, 0], [1, 3, np.int64(2)]
    ),
    "open(slots": Argument(lambda stage, value: stage.speaker.open(1, value), NO_COUNTS, [0, 1, 40]),
}

ENCODER = {
    "encoder": Argument(lambda stage, value: stage.encoder(value), NO_IMAGES, IMAGES),
    "encoder(*": Argument(lambda stage, value: stage.encoder(*value), [(), (X, X)], [(X,)]),
    "encoder(**": Argument(
        lambda stage, value: stage.encoder(**value),
        [{}, {"nope": X}, {"images": X, "more": X}],
        [{"images": X}],
    ),
}

LOADING = {
    "threads": Argument(
        loaded("threads"),
        [0, -1, 1.5, 2.0, 2**40, BIG, True, "2", [1], NAN, np.float64(1)],
        [None, 1, np.int64(1)],
    ),
    "backend": Argument(
        loaded("backend"),
        [
            None,
            5,
            (),
            "",
            "tvm",
            "ONNXRUNTIME",
            b"onnxruntime",
            ["onnxruntime"],
            ("openvino",),
            ("openvino", 5),
        ]
        + [("onnxruntime", {"a": 1}), ("openvino", {5: 1}), {}, ("tensorrt", {"a": 1})],
        ["onnxruntime", ("onnxruntime", {})],
    ),
    "providers": Argument(
        loaded("providers"),
        [[], "x", ["x"], 5, [5], [()], [None], [("CPUExecutionProvider",)], [("CPUExecutionProvider", 5)], {}]
        + [b"x", [("CPUExecutionProvider", {"arena": 1})], [["CPUExecutionProvider", {"arena": 1}]], True],
        [None, "CPUExecutionProvider", ["CPUExecutionProvider"], [("CPUExecutionProvider", {})]],
    ),
    "verify": Argument(loaded("verify"), [None, "no", 0, 1, []], [True, False]),
}

FACTS = {
    "Generation(context": Argument(
        lambda stage, value: Generation(value, 8), [0, *NO_COUNTS], [8, np.int64(8)]
    ),
    "Generation(vocabulary": Argument(lambda stage, value: Generation(8, value), [0, *NO_COUNTS], [8]),
    "Generation(eos": Argument(
        lambda stage, value: Generation(8, 8, value), [2, "2", [1.5], [None], [-1], None], [(), (2,), [2, 3]]
    ),
    "Generation(bos": Argument(lambda stage, value: Generation(8, 8, bos=value), ["2", 1.5, -1], [None, 2]),
    "Generation(chat_template": Argument(
        lambda stage, value: Generation(8, 8, chat_template=value), [5, b"a", ["a"]], [None, "a"]
    ),
}

FACTS |= {
    f"Generation({name}": Argument(
        lambda stage, value, name=name: Generation(8, 8, **{name: value}),
        [5, "a", ["a"], {"a": 5}, {5: "a"}, {"a": None}],
        [{}, {"default": "a"}],
    )
    for name in ("chat_templates", "special_tokens")
}

RUNTIME = SAMPLING | PROMPT | SPEAKER | ENCODER | LOADING | FACTS
