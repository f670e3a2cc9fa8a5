"""TensorRT plugins without its libraries: their launches, executed on the CPU through the host shim.

TensorRT's Python module validates the plugins and computes their launches, behind three empty libraries. No plugin is
executed by TensorRT here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.forms import CASES, Case, arrays, expected, world
from tests.kernels.host import run_plugin
from tests.kernels.test_cuda import assert_close
from tokopt.kernels.catalogue import CUDA_OPS
from tokopt.kernels.launch import BLOCK, signatures
from tokopt.kernels.plugins import PLUGIN_OPS, Described, Expression, Launch, NotAPlugin, evaluate, trace

ROOT = Path(__file__).resolve().parents[2]

R = 4
cases = pytest.mark.parametrize("case", [case for case in CASES if case.op in PLUGIN_OPS], ids=str)


def described(case: Case) -> dict:
    """The arguments with batch, tokens and kept tokens of any number."""
    batch, tokens = 7, case.prefix + 29  # no other size of the worlds is one of these
    names = {batch: "batch", tokens: "tokens", tokens - R: "kept"}

    def of(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return Described(value.dtype, tuple(names.get(size, size) for size in value.shape))

    return {name: of(value) for name, value in world(case, batch, tokens, R, seed=0).items()}


@cases
@pytest.mark.parametrize("sizes", [(1, 9), (2, 12), (3, 130)], ids=str)
def test_chains_equal_naive(case: Case, sizes: tuple[int, int]) -> None:
    """Traced once for sizes that are names; run for others, even and odd, and beyond a tile."""
    batch, free = sizes
    launches, results = trace(case.op, described(case))
    values = world(case, batch, case.prefix + free, R, seed=1, padding=1)
    wanted = expected(case, values)
    for launch in launches:
        again = Launch.from_json(launch.to_json())
        assert again == launch
        outputs = run_plugin(case.op, again, [values[name] for name in launch.inputs])
        values |= {made.name: output for made, output in zip(launch.outputs, outputs, strict=True)}
    assert_close(arrays(tuple(values[name] for name in results)), wanted, torch.float32)


@cases
def test_launches_fit_their_kernels(case: Case) -> None:
    """As many inputs, scalars and outputs as the source says, which is what the plugins are registered with."""
    for launch in trace(case.op, described(case))[0]:
        counts = (len(launch.inputs), len(launch.scalars), len(launch.outputs))
        assert counts == signatures(case.op)[launch.kernel]


def all_launches() -> list[tuple[Case, Launch]]:
    return [(case, x) for case in CASES if case.op in PLUGIN_OPS for x in trace(case.op, described(case))[0]]


def test_every_kernel_is_a_plugin() -> None:
    launched = {(case.op, launch.kernel) for case, launch in all_launches()}
    assert launched == {(op, kernel) for op in PLUGIN_OPS for kernel in signatures(op)}
    assert set(CUDA_OPS) - set(PLUGIN_OPS) == {"quantize_keys", "dequantize_keys"}


def test_what_cannot_be_launched_says_why() -> None:
    with pytest.raises(NotAPlugin, match=r"not built for torch\.float64"):
        trace("top_tokens", {"score": Described(torch.float64, (2, 9)), "r": 2, "prefix": 1})
    with pytest.raises(NotAPlugin, match="nothing to launch"):
        metric = Described(torch.float32, ("batch", 9, 8))
        trace(
            "energy_match",
            {
                "metric": metric,
                "size": Described(torch.float32, ("batch", 9)),
                "r": 0,
                "prefix": 1,
                "margin": 0.5,
            },
        )


# --- TensorRT's own Python --------------------------------------------------------------------------------

LIBRARIES = {
    "nvinfer": (
        "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
        "getBuilderPluginRegistry getPluginRegistry"
    ),
    "nvinfer_plugin": "initLibNvInferPlugins",
    "nvonnxparser": "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getNvOnnxParserVersion",
}
"""What TensorRT's Python module links to, as functions that return nothing."""

SCRIPT = """
import ctypes, json, operator, sys
folder, launches = sys.argv[1], json.loads(sys.argv[2])
for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
    ctypes.CDLL(f"{folder}/lib{library}.so.11", mode=ctypes.RTLD_GLOBAL)
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
import tensorrt_bindings.plugin as plugin
sys.modules["tensorrt.plugin"] = plugin
from tensorrt.plugin import _lib, _tensor
from tokopt.kernels.plugins import register_plugins

_lib._register_plugin_creator = lambda *given: None  # the registry is in the library
register_plugins("sm_90")

class Numbers:
    \"\"\"Expressions of sizes that are numbers.\"\"\"
    def constant(self, value):
        return value
    def operation(self, kind, a, b):
        kinds = trt.DimensionOperation
        return {kinds.SUM: operator.add, kinds.SUB: operator.sub, kinds.PROD: operator.mul,
                kinds.FLOOR_DIV: operator.floordiv, kinds.MAX: max}[kind](a, b)

_tensor.SymIntExpr._exprBuilder = Numbers()
found = []
for name, text, shapes in launches:
    definition = _lib.QDP_REGISTRY[name]
    given = [plugin.from_shape_expr(tuple(shape), trt.DataType.FLOAT) for shape in shapes]
    made = definition.register_func(*given, launch=text)
    made = made if isinstance(made, tuple) else (made,)
    kernel, code, settings, scalars = definition.aot_impl_func(*given, text, made, None)
    assert all(isinstance(value, plugin.SymInt32) for value in scalars)
    assert f".entry {kernel}(".encode() in code and b".target sm_90" in code
    found.append([
        [settings.grid_x._expr, settings.grid_y._expr, settings.block_x._expr], [value._expr for value in scalars],
        [[output.dtype.name, *(size._expr for size in output.shape_expr)] for output in made],
    ])
print(json.dumps([len(_lib.QDP_REGISTRY), found]))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    for name, functions in LIBRARIES.items():
        code = folder / f"{name}.c"
        code.write_text(
            "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions.split())
        )
        target = f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{target}", code, "-o", folder / target]
        subprocess.run(command, check=True)
    return folder


def test_tensorrt_accepts_the_plugins_and_their_launches(libraries: Path) -> None:
    """All are registered, and its classes make of every launch the numbers that the host shim is launched with."""
    calls, wanted = [], []
    shapes = [[7, 21, 8, 32]] * 8  # of the axes, a kernel's expressions name those that its inputs have

    def number(expression: Expression) -> int:
        return evaluate(expression, lambda i, axis: shapes[i][axis], max)

    for case, launch in all_launches():
        calls.append((f"tokopt::{case.op}_{launch.kernel}", launch.to_json(), shapes[: len(launch.inputs)]))
        settings = [*map(number, launch.grid), BLOCK], [*map(number, launch.scalars)]
        outputs = [[output.dtype, *map(number, output.shape)] for output in launch.outputs]
        wanted.append([*settings, outputs])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(libraries), json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    registered, found = json.loads(done.stdout.splitlines()[-1])
    assert registered == sum(len(signatures(op)) for op in PLUGIN_OPS)
    assert found == wanted
