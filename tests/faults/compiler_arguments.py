"""Arguments of the compiler: capture, pipelines, bundles, export, measurements, and paths of artifacts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokopt
from tests.faults.cases import Argument, Call
from tokopt import AxisRange, Context, EngineOptions, Machine, Pipeline
from tokopt.measure.fidelity import fidelity
from tokopt.measure.timing import open_runner
from tokopt.passes import ToMe
from tokopt.pipeline.bisect import bisect
from tokopt.pipeline.observers import dump_to
from tokopt.runtime import Generation, load

NAN, INF = math.nan, math.inf
X = torch.ones(2, 3)
NO_BUNDLES: list[Any] = [None, 5, "bundle", {}, torch.nn.Linear(1, 1), Path("bundle")]
NO_PATHS: list[Any] = [None, 5, 1.5, b"model.tokopt", "", "a\0b", "a\ud800", "a" * 300, "a/" * 4000, [], True]
NO_ARTIFACTS: list[Any] = [*NO_PATHS, "missing", __file__, Path("missing"), f"{__file__}/inside"]
NO_TOLERANCES: list[Any] = ["a", NAN, INF, -1, [1], 1j, np.array([0.1])]


def captured(name: str) -> Call:
    """A keyword of ``capture``."""
    return lambda stage, value: tokopt.capture(stage.module, (stage.x,), **{name: value})


def optimized(name: str) -> Call:
    """A keyword of ``optimize``."""
    return lambda stage, value: tokopt.optimize(stage.bundle, "", **{name: value})


def exported(name: str) -> Call:
    """A keyword of ``export``."""
    return lambda stage, value: tokopt.export(stage.bundle, stage.fresh, **{name: value})


def tuned(name: str) -> Call:
    """A keyword of ``tune``."""
    return lambda stage, value: tokopt.tune(stage.bundle, [stage.x] * 2, stage.fresh, **{name: value})


CAPTURE = {
    "capture": Argument(
        lambda stage, value: tokopt.capture(value, (stage.x,)),
        [*NO_PATHS, "missing.pt2", Path("missing.pt2"), X, torch.relu, torch.nn.Linear],
    ),
    "args": Argument(
        lambda stage, value: tokopt.capture(stage.module, value),
        [X, None, 5, "images", {}, (), ("images",), (None,), (5,), (torch.ones(2, 4),), (torch.ones(0, 3),)],
        [(X,), [torch.ones(1, 3)]],
    ),
    "kwargs": Argument(
        lambda stage, value: tokopt.capture(stage.module, (), value),
        [5, "a", [1], {5: X}, {"nope": X}, X],
        [{"input": X}],
    ),
    "dynamic": Argument(
        captured("dynamic"),
        ["batch", 5, ["batch"], {"input": "batch"}, {"input": 5}, {"nope": {0: "batch"}}]
        + [{"input": {5: "batch"}}, {"input": {"0": "batch"}}, {"input": (5, None)}, {5: {0: "batch"}}]
        + [{"input": ("my batch", None)}, {"input": ("", None)}, {"input": ("a", None, "b")}],
        [None, {}, {"input": ("batch", None)}, {"input": {-2: "n"}}],
    ),
    "ranges": Argument(
        captured("ranges"),
        ["batch", 5, {"batch": 4}, {"batch": (1, 4)}, {"nope": AxisRange(1, 4)}, {"batch": AxisRange(4, 2)}]
        + [{"batch": AxisRange(1, value)} for value in (1.5, "4", 0)]  # type: ignore[arg-type]
        + [{"batch": AxisRange(-1, 4)}, {"batch": None}, {5: AxisRange(1, 4)}],
        [None, {}, {"batch": AxisRange(1, 32)}, {"batch": AxisRange(2)}],
    ),
    "tokenizer": Argument(captured("tokenizer"), [5, b"{}", Path("a"), {}], [None]),
    "capture_lm": Argument(lambda stage, value: tokopt.capture_lm(value), [*NO_ARTIFACTS, X, torch.relu]),
    "capture_lm(generation": Argument(
        lambda stage, value: tokopt.capture_lm(stage.module, generation=value), [None, 5, "a", {}, (1024, 64)]
    ),
    "capture_lm(tokenizer": Argument(
        lambda stage, value: tokopt.capture_lm(stage.module, tokenizer=value, generation=Generation(8, 8)),
        [5, b"{}", Path("a"), "{}"],
    ),
}

PIPELINES = {
    "optimize": Argument(lambda stage, value: tokopt.optimize(value, "tome{r=0}"), NO_BUNDLES),
    "passes": Argument(
        lambda stage, value: tokopt.optimize(stage.bundle, value),
        [None, 5, 1.5, b"tome", [5], ["tome"], ToMe, ToMe(r=4), [ToMe], {}, [None], "nope", "tome{r=", "\0"]
        + ["tome{r=1.5}", "tome{r=-1}", "tome{k=1}", "tome{r=true}"],
        ["", [], (), Pipeline()],
    ),
    "strict": Argument(optimized("strict"), ["no", None, 1, []], [True, False]),
    "calibration": Argument(
        optimized("calibration"), [5, b"text", True], [None, [], iter([]), [X], (X,), "text", Path("text")]
    ),
    "context": Argument(optimized("context"), [5, "strict", {}, [], True, Context], [None, Context()]),
    "context and": Argument(
        lambda stage, value: tokopt.optimize(stage.bundle, "", context=Context(), **value),
        [{"strict": True}, {"calibration": []}],
        [{}],
    ),
    "observers": Argument(
        lambda stage, value: Context(observers=value), [5, (5,), "ab", print, None], [(), [print]]
    ),
    "reproducers": Argument(
        lambda stage, value: Context(reproducers=value), [5, b"a", "", True], [None, "a", Path("a")]
    ),
    "Pipeline": Argument(
        lambda stage, value: Pipeline(value),
        [5, "tome", ["tome"], (5,), ToMe(r=4), None],
        [(), (ToMe(r=4),), [ToMe(r=4)]],
    ),
    "parse": Argument(
        lambda stage, value: tokopt.parse(value), [None, 5, b"tome", ["tome"], ToMe(r=4)], ["", "tome{r=4}"]
    ),
    "dump_to": Argument(lambda stage, value: dump_to(value), NO_PATHS, ["a", Path("a")]),
    "bisect": Argument(lambda stage, value: bisect(value, ""), NO_BUNDLES),
    "bisect(passes": Argument(
        lambda stage, value: bisect(stage.bundle, value), [None, 5, [5], "nope"], ["", []]
    ),
    "bisect(tolerance": Argument(
        lambda stage, value: bisect(stage.bundle, "", value), [*NO_TOLERANCES, None], [0, np.float32(1)]
    ),
    "bisect(context": Argument(
        lambda stage, value: bisect(stage.bundle, "", context=value), [5, {}, "a"], [None, Context()]
    ),
}

BUNDLES = {
    "bundle(": Argument(
        lambda stage, value: stage.bundle(*value),
        [
            (),
            (5,),
            (None,),
            (X.numpy(),),
            (X.double(),),
            (X[0],),
            (torch.ones(2, 4),),
            (X[:0],),
            (X, X),
            ("a",),
        ],
        [(X,), (X[:1],)],
    ),
    "state": Argument(lambda stage, value: stage.bundle.state(value), ["nope", None, 5]),
    "fidelity(before": Argument(lambda stage, value: fidelity(value, stage.bundle, [X]), NO_BUNDLES),
    "fidelity(after": Argument(lambda stage, value: fidelity(stage.bundle, value, [X]), NO_BUNDLES),
    "fidelity(samples": Argument(
        lambda stage, value: fidelity(stage.bundle, stage.bundle, value),
        [None, 5, "text", b"text", [], [X[0]], [(X, X)], [5], [None], ["text"]],
        [[X.numpy()], [X]],
    ),
}

EXPORT = {
    "export": Argument(lambda stage, value: tokopt.export(value, stage.fresh), NO_BUNDLES),
    "export(path": Argument(lambda stage, value: tokopt.export(stage.bundle, value), NO_PATHS),
    "target": Argument(exported("target"), [None, 5, "", "ONNX", b"onnx", ["onnx"], []], ["torch"]),
    "overwrite": Argument(exported("overwrite"), [None, "no", 1, []]),
    "check": Argument(exported("check"), [None, "no", 0]),
    "tolerance": Argument(exported("tolerance"), NO_TOLERANCES),
    "engine": Argument(exported("engine"), [5, "sm_86", {}, EngineOptions()]),
    "progress": Argument(exported("progress"), [5, "a", True, []]),
    "export(**": Argument(
        lambda stage, value: tokopt.export(stage.bundle, stage.fresh, **value),
        [],
        [
            {
                "overwrite": True,
                "check": False,
                "tolerance": None,
                "engine": None,
                "progress": lambda line: None,
            }
        ],
    ),
    "arch": Argument(
        lambda stage, value: EngineOptions(value), [5, "86", b"sm_86", "", ["sm_86"]], ["sm_86"]
    ),
    "profiles": Argument(
        lambda stage, value: EngineOptions(profiles=value),
        [5, "batch=1", [5], ["batch"], ["batch=0"], ["batch=3:2:1"], None, {}],
        [(), ["batch=1:8:32"]],
    ),
    "workspace": Argument(
        lambda stage, value: EngineOptions(workspace=value), [0, *NO_TOLERANCES], [None, 1, 0.5]
    ),
    "timing_cache": Argument(
        lambda stage, value: EngineOptions(timing_cache=value), [5, b"a", "", True], [None, "a", Path("a")]
    ),
    "plugins": Argument(lambda stage, value: EngineOptions(plugins=value), [None, "no", 1], [True, False]),
    "load(": Argument(lambda stage, value: load(value), NO_ARTIFACTS),
    "verify(": Argument(lambda stage, value: tokopt.verify(value), NO_ARTIFACTS),
    "open_bundle": Argument(lambda stage, value: tokopt.open_bundle(value), NO_ARTIFACTS),
    "open_runner": Argument(lambda stage, value: open_runner(value), NO_ARTIFACTS),
    "open_runner(threads": Argument(
        lambda stage, value: open_runner(stage.encoder.path, value), [0, 1.5, "2", 2**40], [None, 1]
    ),
    "example": Argument(
        lambda stage, value: open_runner(stage.encoder.path).example(value),
        [0, -1, 1.5, "2", [1]],
        [None, 1, 4],
    ),
}

TUNING = {
    "tune": Argument(lambda stage, value: tokopt.tune(value, [X, X], stage.fresh), NO_BUNDLES),
    "samples": Argument(
        lambda stage, value: tokopt.tune(stage.bundle, value, stage.fresh),
        [None, 5, "text", [], [X], b"text"],
    ),
    "folder": Argument(lambda stage, value: tokopt.tune(stage.bundle, [X, X], value), NO_PATHS),
    "floor": Argument(tuned("floor"), [None, 5, "cosine", "cosine>1", "KL<=1", "cosine>=nan", 0.9]),
    "candidates": Argument(
        tuned("candidates"), [None, 5, "tome", ["tome"], [5], [[5]], [["nope"]], [["tome{"]]]
    ),
    "metric": Argument(tuned("metric"), [5, "cosine", []]),
    "minutes": Argument(tuned("minutes"), [None, *NO_TOLERANCES]),
    "machine": Argument(tuned("machine"), [5, "cpu", {}, Machine]),
    "tune(progress": Argument(tuned("progress"), [5, "a", True]),
    "Machine(threads": Argument(
        lambda stage, value: Machine(threads=value), [0, -1, 1.5, "2", True, 2**40], [None, 2]
    ),
    "Machine(prompt": Argument(lambda stage, value: Machine(prompt=value), [0, -1, 1.5, "2", None], [1, 256]),
    "Machine(batch": Argument(lambda stage, value: Machine(batch=value), [0, -1, 1.5, "2"], [None, 4]),
}

COMPILER = CAPTURE | PIPELINES | BUNDLES | EXPORT | TUNING
