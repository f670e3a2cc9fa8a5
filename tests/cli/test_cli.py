"""The command: every verb works end to end, and bad input becomes one line on stderr and an exit code."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import tokopt
from tests.cli.command import answer, complaint
from tests.zoo import ZOO
from tests.zoo.entries import hugging_face
from tokopt.cli import main, verbs
from tokopt.cli.verbs import VERBS
from tokopt.measure import machine
from tokopt.passes import PASSES

LAYERS = 2
"""One for what a pass does to all blocks, and another for what it does to one."""


def vit() -> tuple:
    return module_alone(), ZOO["vit"].inputs(), ZOO["vit"].dynamic


def module_alone() -> torch.nn.Module:
    return hugging_face("ViTModel", "ViTConfig", image_size=24, patch_size=4, num_hidden_layers=LAYERS)()


def warning() -> torch.nn.Module:
    warnings.warn("the weights are old", stacklevel=1)
    return module_alone()


def broken() -> None:
    raise ValueError("no weights here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a merged artifact (target torch), and both exported to ONNX."""
    folder = tmp_path_factory.mktemp("artifacts")
    steps = [
        ["capture", "tests.cli.test_cli:vit", "-o", "plain.tokopt"],
        ["optimize", "plain.tokopt", "tome{r=4}", "-o", "merged.tokopt"],
        ["export", "plain.tokopt", "-o", "plain.onnx.tokopt"],
        ["export", "merged.tokopt", "-o", "merged.onnx.tokopt", "--target", "onnx"],
    ]
    before = Path.cwd()
    os.chdir(folder)
    try:
        for step in steps:
            assert main([*step, "--json"]) == 0
    finally:
        os.chdir(before)
    return folder


# ------------------------------------------------------------------------------------------- the verbs


def test_inspect_shows_the_blocks(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    entry = ZOO["vit"]
    data = answer(capsys, "inspect", folder / "plain.tokopt")
    assert [b["index"] for b in data["blocks"]] == list(range(LAYERS))
    assert {b["kind"] for b in data["blocks"]} == {"self"}
    assert {b["tokens"] for b in data["blocks"]} == {entry.tokens}
    assert sum(b["flops"] for b in data["blocks"]) < data["cost"]["flops"]
    merged = answer(capsys, "inspect", folder / "merged.tokopt")
    assert [b["tokens"] for b in merged["blocks"]] == [entry.tokens - 4 * i for i in range(LAYERS)]
    assert merged["pipeline"] == "tome{r=4}" and merged["semantics"] == "approximate"


def test_inspect_of_an_onnx_artifact_shows_its_manifest(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    data = answer(capsys, "inspect", folder / "merged.onnx.tokopt")
    assert data["pipeline"] == "tome{r=4}"
    assert data["passes"][0]["matches"] == LAYERS
    assert main(["inspect", str(folder / "merged.onnx.tokopt")]) == 0
    assert "forward.onnx" in capsys.readouterr().out


def test_inspect_names_nodes_without_kernels(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    data = answer(capsys, "inspect", folder / "merged.onnx.tokopt", "--provider", "cuda")
    assert set(data["lacking"]) == {"forward"} and "OperatorKernels.md" in data["source"]
    assert all(count > 0 for count in data["lacking"]["forward"].values())
    assert "holds no ONNX" in complaint(capsys, 2, "inspect", folder / "plain.tokopt", "--provider", "cuda")


def test_optimize_reports_every_pass(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    data = answer(
        capsys,
        *("optimize", folder / "plain.tokopt", "evit{keep=0.5 layers=[1]}", "-o", tmp_path / "e"),
        *("--dump", tmp_path / "ir"),
    )
    assert "evit" in (tmp_path / "ir" / "01-evit.forward.py").read_text()
    (record,) = data["passes"]
    assert record["text"] == "evit{keep=0.5 layers=[1]}" and record["matches"] == 1
    assert record["after"]["flops"] < record["before"]["flops"]
    assert tokopt.open_bundle(tmp_path / "e").pipeline == record["text"]


def test_optimize_takes_any_name_of_a_model(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    """A module:factory, a .pt2 file and an artifact give the same program."""
    model, inputs, _ = vit()
    exported = torch.export.export(model, (), inputs, strict=False)
    torch.export.save(exported, tmp_path / "vit.pt2")
    names = [folder / "plain.tokopt", tmp_path / "vit.pt2", "tests.cli.test_cli:vit"]
    flops = [answer(capsys, "inspect", name)["cost"]["flops"] for name in names]
    assert flops[0] == flops[1] == flops[2]


def test_estimate_says_when_merging_does_not_pay(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37 tokens of 48 channels: the matching costs more than it saves, and nothing may claim otherwise."""
    monkeypatch.setattr(machine, "measure_machine", cache(machine.measure_machine))
    data = answer(capsys, "estimate", folder / "plain.tokopt", "tome{r=2}")
    assert data["predicted_speedup"] < 1.05 and data["pays"] is False
    assert data["passes"][0]["after"]["tokens"] < data["passes"][0]["before"]["tokens"]
    assert main(["estimate", str(folder / "plain.tokopt"), "tome{r=2}"]) == 0
    out = capsys.readouterr().out
    assert "No gain to expect" in out or "would be slower" in out


def test_run_equals_the_bundle(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    images = ZOO["vit"].inputs(2, seed=7)["pixel_values"]
    np.save(tmp_path / "images.npy", images.numpy())
    expected = tokopt.open_bundle(folder / "merged.tokopt")(images)
    for artifact in ("merged.tokopt", "merged.onnx.tokopt"):
        data = answer(capsys, "run", folder / artifact, tmp_path / "images.npy", "-o", tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz") as outputs:
            assert list(outputs) == [o["name"] for o in data["outputs"]]
            for name, value in zip(outputs, expected, strict=True):
                np.testing.assert_allclose(outputs[name], value.numpy(), atol=1e-4)


def test_run_reads_images(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("red.png", "red"), ("grey.jpg", "grey")):
        image.new("RGB", (50, 31), colour).save(tmp_path / name)
    data = answer(capsys, "run", folder / "plain.onnx.tokopt", tmp_path / "red.png", tmp_path / "grey.jpg")
    assert [o["shape"][:2] for o in data["outputs"]] == ["[2", "[2"]
    (tmp_path / "fake.png").write_text("not an image")
    error = complaint(capsys, 2, "run", folder / "plain.onnx.tokopt", tmp_path / "fake.png")
    assert "no readable image" in error


def test_quantize_with_images_and_compare(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    files = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for file in files:
        image.effect_noise((40, 40), 90).convert("RGB").save(file)
    given, made = folder / "plain.tokopt", tmp_path / "int8.tokopt"
    pipeline = "smoothquant,int8{activations=static}"
    done = answer(capsys, "optimize", given, pipeline, "-o", made, "--calibrate", *files)
    assert [step["matches"] > 0 for step in done["passes"]] == [True, True]
    found = answer(capsys, "compare", given, made, *files)
    assert 0.9 < found["smallest cosine"] <= found["cosine"] < 1
    assert found["output"] == tokopt.open_bundle(given).main.outputs[0].name
    assert "needs inputs to calibrate" in complaint(
        capsys, 2, "optimize", given, pipeline, "-o", tmp_path / "b"
    )


def test_tuning_that_has_no_time_says_that_nothing_was_tried(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}.npy" for i in range(2)]
    for file in files:
        np.save(file, np.ones((1, 3, 24, 24), np.float32))
    command = ["tune", folder / "plain.tokopt", *files, "-o", tmp_path / "t", "--candidates", "tome{r=1}"]
    assert main([*map(str, command), "--minutes", "0"]) == 1
    out = capsys.readouterr().out
    assert (
        "1 candidates were left for want of time" in out and "Nothing was tried; give more --minutes." in out
    )


def test_verify_passes_and_finds_damage(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    for name, runs in (("merged.tokopt", False), ("merged.onnx.tokopt", True)):
        data = answer(capsys, "verify", folder / name)
        assert data["ok"] and bool(data["outputs"]) == runs
    copy = tmp_path / "copy.tokopt"
    copy.mkdir()
    for file in (folder / "merged.onnx.tokopt").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert main(["verify", str(copy), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"] and "weights.data" in data["faults"][0]


def test_bench_times_in_turns(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    names = [folder / "plain.onnx.tokopt", folder / "merged.onnx.tokopt"]
    data = answer(capsys, "bench", *names, "--rounds", 3, "--batch", 2, "--threads", 1)
    assert [r["artifact"] for r in data["results"]] == list(map(str, names))
    assert data["results"][0]["speedup"] == 1
    assert all(0 < r["min_ms"] <= r["median_ms"] for r in data["results"])


def test_engines_are_built_and_shown(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "engine.tokopt"
    options = ("--target", "tensorrt", "--arch", "sm_86", "--profile", "batch=1:2:4", "--workspace", "1")
    answer(capsys, "export", folder / "merged.tokopt", "-o", path, *options)
    engine = answer(capsys, "inspect", path)["programs"]["forward"]["engine"]
    assert (engine["builder"], engine["arch"]) == ("tensorrt-rtx", "sm_86")
    assert engine["profiles"] == {"batch": {"min": 1, "opt": 2, "max": 4}}
    assert main(["inspect", str(path)]) == 0
    assert "batch=1:2:4" in capsys.readouterr().out
    answer(capsys, "run", path)  # the portable form, on the default backend
    assert "--target tensorrt" in complaint(
        capsys, 2, "run", folder / "merged.onnx.tokopt", "--backend", "tensorrt"
    )


def test_bad_engine_options(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    model, out = folder / "plain.tokopt", tmp_path / "engine.tokopt"
    for extra, message in (
        (("--target", "tensorrt", "--arch", "sm86"), "'sm86' is no compute capability"),
        (("--target", "tensorrt", "--arch", "sm_90"), "builds no engines for sm_90, only for sm_75"),
        (("--target", "tensorrt", "--profile", "batch=9:1"), "is no profile"),
        (("--target", "tensorrt", "--arch", "sm_86", "--profile", "slots=9"), "there is no axis 'slots'"),
        (("--target", "onnx", "--arch", "sm_86"), "mean nothing to the target 'onnx'"),
        (("--target", "torch-tensorrt", "--strict", "--plugins"), "leave plugins out"),
    ):
        assert message in complaint(capsys, 2, "export", model, "-o", out, *extra)
    assert not out.exists()


def test_another_engine_computes_the_same(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    artifact, out = folder / "merged.onnx.tokopt", [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, extra in zip(out, ((), ("--backend", "openvino")), strict=True):
        answer(capsys, "run", artifact, "-o", path, *extra)
    with np.load(out[0]) as one, np.load(out[1]) as other:
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_allclose(other[name], one[name], atol=1e-4)
    timed = answer(capsys, "bench", artifact, "--rounds", 2, "--backend", "openvino", "--threads", 1)
    assert timed["results"][0]["min_ms"] > 0
    error = complaint(capsys, 2, "run", folder / "plain.tokopt", "--backend", "openvino")
    assert "is of target torch" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is that of a machine without a GPU")
def test_torch_cuda_is_refused_without_a_device(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "finds no CUDA device" in complaint(
        capsys, 2, "run", folder / "plain.tokopt", "--backend", "torch-cuda"
    )


def test_export_for_triton_takes_a_bundle_or_an_onnx_artifact(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    options = ("--target", "triton", "--max-batch", 4, "--instances", 2, "--threads", 1)
    configs = []
    for name in ("merged.tokopt", "merged.onnx.tokopt"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "vit"
        data = answer(capsys, "export", folder / name, "-o", path, *options)
        assert data["target"] == "triton"
        assert data["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        configs.append((path / "config.pbtxt").read_text())
    assert configs[0] == configs[1]
    for setting in ('name: "vit"', "max_batch_size: 4", "count: 2", "intra_op_thread_count"):
        assert setting in configs[0]
    error = complaint(capsys, 2, "export", folder / "plain.tokopt", "-o", tmp_path / "x", "--max-batch", 4)
    assert "--max-batch belongs to --target triton" in error
    assert not (tmp_path / "x").exists()


def test_bisect_names_the_first_pass_that_moves_an_output_too_far(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    pipeline = "random{r=0},random{r=1 layers=[1]},random{r=9}"
    command = ["bisect", str(folder / "plain.tokopt"), "--json"]
    assert main([*command, pipeline, "--tolerance", "1e-9"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["culprit"] == "random{r=1 layers=[1]}" and len(data["steps"]) == 3
    assert main([*command, "random{r=9}", "--tolerance", "1e9"]) == 0
    assert json.loads(capsys.readouterr().out)["culprit"] is None


def test_passes_lists_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    listed = answer(capsys, "passes")
    assert [p["name"] for p in listed] == list(PASSES)
    known = {
        "r",
        "budget",
        "residual",
        "only",
        "press",
        "drafter",
        "at",
        "count",
        "min",
        "after",
        "neighbours",
    }
    assert all(p["summary"] and (known & {*p["options"]} or not p["options"]) for p in listed)
    plain = [p for p in listed if None not in p["options"].values()]  # one that wraps another has no default
    assert all(p["usage"] == " ".join(f"{k}={v}" for k, v in p["options"].items()) for p in plain)


# ---------------------------------------------------------------------------------- models by name


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_hugging_face_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    """A saved model is captured from its folder; image size and text axes come from its files."""
    ZOO[name].build().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    data = answer(capsys, "capture", tmp_path / "model", "-o", tmp_path / "out.tokopt")
    axes = {spec["name"]: spec["axes"] for spec in data["inputs"]}
    if name == "vit":
        assert axes == {"pixel_values": ["batch", 3, 24, 24]}
    else:
        assert axes == {"input_ids": ["batch", "tokens"], "attention_mask": ["batch", "tokens"]}


def test_factory_that_returns_a_module_needs_shapes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["capture", "tests.cli.test_cli:module_alone", "-o", tmp_path / "out.tokopt"]
    assert "--shape" in complaint(capsys, 2, *command)
    data = answer(capsys, *command, "--shape", "2,3,24,24")
    assert data["inputs"][0]["axes"] == ["batch", 3, 24, 24]


def test_warnings_are_lines_as_errors_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["capture", "tests.cli.test_cli:warning", "-o", str(tmp_path / "out.tokopt")]
    assert main(command) == 2
    assert "\ntokopt: warning: the weights are old\ntokopt: error: " in capsys.readouterr().err
    assert main([*command, "--shape", "2,3,24,24"]) == 0
    assert capsys.readouterr().err.endswith("\ntokopt: warning: the weights are old\n")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "names no model: nothing of that name is on this machine; give"),
        ("tests/cli", "names no model: the folder has neither config.json nor manifest.json; give"),
        ("pyproject.toml", "names no model: the file ends in neither .gguf nor .pt2; give"),
        ("no_such_module:factory", "No module named"),
        ("tests.cli.test_cli:missing", "has no attribute 'missing'"),
        ("tests.cli.test_cli:broken", "ValueError: no weights here"),
        ("tests.cli.test_cli:VERBS", "not callable"),
    ],
)
def test_name_of_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, message: str
) -> None:
    error = complaint(capsys, 2, "capture", model, "-o", tmp_path / "out.tokopt")
    assert message in error
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------ errors and exit codes


def test_bad_pipeline_is_bad_input(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    error = complaint(capsys, 2, "optimize", folder / "plain.tokopt", "tom{r=1}", "-o", tmp_path / "x")
    assert "did you mean 'tome'?" in error
    error = complaint(capsys, 2, "optimize", folder / "plain.tokopt", "tome{r=30}", "-o", tmp_path / "x")
    assert "r=30 is too large for block 0" in error
    assert not any(tmp_path.iterdir())


def test_refusal_in_strict_mode_exits_3(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    command = ["optimize", folder / "plain.tokopt", "tome{r=0}", "-o", tmp_path / "x", "--strict"]
    assert "strict" in complaint(capsys, 3, *command)
    assert not any(tmp_path.iterdir())


def test_reduced_artifact_is_not_reduced_again(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    """A saved program no longer tells its prefix from its merged tokens, so another reduction is refused."""
    command = ["optimize", folder / "merged.tokopt", "random{r=2}", "-o", tmp_path / "x", "--strict"]
    assert "in one pipeline" in complaint(capsys, 3, *command)


def test_bad_inputs_of_run(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    artifact = folder / "plain.onnx.tokopt"
    np.save(tmp_path / "long.npy", np.zeros((1, 3, 25, 24), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((1, 3, 24, 24)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "notes.txt").write_text("hello")
    for name, message in [
        ("long.npy", "axis 2 of input 'pixel_values' has size 25"),
        ("double.npy", "float64"),
        ("objects.npy", "without pickled objects"),
        ("notes.txt", "inputs are one .npz"),
        ("absent.npy", "there is no file"),
    ]:
        assert message in complaint(capsys, 2, "run", artifact, tmp_path / name)
    np.save(tmp_path / "good.npy", np.zeros((1, 3, 24, 24), np.float32))
    error = complaint(capsys, 2, "run", artifact, tmp_path / "good.npy", "-o", tmp_path / "out.npy")
    assert "2 outputs" in error
    assert not (tmp_path / "out.npy").exists()


def test_traceback_on_request(folder: Path) -> None:
    with pytest.raises(tokopt.TokoptError):
        main(["estimate", str(folder / "plain.tokopt"), "tom", "--traceback"])


def test_existing_output_is_kept(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    target = folder / "plain.onnx.tokopt"
    before = sorted((f.name, f.stat().st_mtime_ns) for f in target.iterdir())
    assert "exists" in complaint(capsys, 2, "export", folder / "plain.tokopt", "-o", target)
    assert before == sorted((f.name, f.stat().st_mtime_ns) for f in target.iterdir())


# ----------------------------------------------------------------------------------------- the shell


def test_every_verb_is_a_module_and_every_module_a_verb() -> None:
    assert sorted(VERBS) == sorted(module.name for module in pkgutil.iter_modules(verbs.__path__))


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  tokopt {verb}" in out and "--json" in out


@pytest.mark.parametrize("argv", [[], ["optimise"], ["export", "x"], ["bench", "x", "--rounds", "0"]])
def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: tokopt" in capsys.readouterr().err


def test_command_in_a_shell(folder: Path) -> None:
    """Help imports no torch; output that is no terminal holds no control characters and may be cut off."""
    code = (
        "import sys, tokopt.cli\ntry: tokopt.cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    command = [sys.executable, "-c", "import sys, tokopt.cli; sys.exit(tokopt.cli.main())", "inspect"]
    artifact = str(folder / "merged.onnx.tokopt")
    done = subprocess.run([*command, artifact], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout and done.stderr == ""
    reader = subprocess.Popen([*command, artifact], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout and reader.stderr
    reader.stdout.close()
    assert reader.wait() == 0 and reader.stderr.read() == b""
