"""A disk that is full, a folder that cannot be written to and a name that is no UTF-8 are an ArtifactError.

torch's writer ended the process when a write failed, and when its path was no UTF-8; the writers of ONNX raised a raw
OSError. The law: whatever is written, and wherever it stops, there is one sentence, nothing is left, and the old
artifact is intact.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import tokopt
from tests.lower.encoders import vision
from tokopt import artifact
from tokopt.cli.verbs.run import _save
from tokopt.errors import ArtifactError, InputError, PassError
from tokopt.pipeline.base import Context
from tokopt.pipeline.observers import dump_to

NOT_UTF8 = os.fsdecode(b"a\xff.tokopt")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails, as on a full disk; the process that asked is meant, not the one that writes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each target."""
    folder = tmp_path_factory.mktemp("whole")
    return {t: tokopt.export(vision(), folder / t, target=t, check=False) for t in ("torch", "onnx")}


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_a_full_disk_leaves_the_old_artifact(target: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """The disk fills within the largest file, within the smaller ones, and at once."""
    path = Path(shutil.copytree(whole[target], tmp_path / "a.tokopt"))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    sizes = sorted(len(data) for data in before.values())
    for limit in [sizes[-1] - 1, sizes[0] - 1, 0] if target == "torch" else [sizes[-1] - 1]:
        with files_of_at_most(limit), pytest.raises(ArtifactError, match=r"cannot be written \(.*too large"):
            tokopt.export(vision(), path, target=target, overwrite=True, check=False)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        assert os.listdir(tmp_path) == ["a.tokopt"]


def test_torch_takes_the_stream_for_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokopt.export(vision(), tmp_path / "a.tokopt", target="torch")
    assert not any(capfd.readouterr())


def test_a_weight_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised within a write of torch's does not end the process either."""

    class Interrupted:
        def __init__(self, file: object) -> None:
            self.count = 0

        def write(self, data: bytes) -> int:
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            return len(data)

        def seek(self, *arguments: int) -> int:
            return 0

    deferred = artifact._Deferred
    monkeypatch.setattr(artifact, "_Deferred", lambda file: deferred(cast(Any, Interrupted(file))))
    with pytest.raises(KeyboardInterrupt):
        tokopt.export(vision(), tmp_path / "a.tokopt", target="torch")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("name", [NOT_UTF8, "a\0.tokopt", "a" * 400, "a" * 250])
def test_a_name_that_no_file_may_have(target: str, name: str, tmp_path: Path) -> None:
    """The last is short enough for a file, but not for its temporary name."""
    with pytest.raises((ArtifactError, InputError), match="another path"):
        tokopt.export(vision(), tmp_path / name, target=target)
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    with pytest.raises(ArtifactError, match="another path"):
        tokopt.export(vision(), folder / "a.tokopt", target="torch")
    assert not os.listdir(folder)


def test_a_folder_that_does_not_take_files(tmp_path: Path) -> None:
    """Root may write everywhere but here."""
    with pytest.raises(ArtifactError, match="cannot be written"):
        tokopt.export(vision(), "/proc/a.tokopt", target="torch")


def test_outputs_of_a_run_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    _save(path, {"features": np.zeros(3)})
    before = path.read_bytes()
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written"):
        _save(path, {"features": np.zeros(3000)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["features.npy"]


def test_a_picture_on_a_full_disk(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    from tokopt.measure.picture import save_picture

    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written"):
        save_picture(Image.fromarray(noise), tmp_path / "a.png")
    assert not os.listdir(tmp_path)


def test_a_model_of_triton_on_a_full_disk(whole: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    from tokopt.lower.triton.model import write_model

    with files_of_at_most(2000), pytest.raises(ArtifactError, match="cannot be written"):
        write_model(whole["onnx"], tmp_path / "vit")
    assert not os.listdir(tmp_path)


def test_dumps_on_a_full_disk(tmp_path: Path) -> None:
    with files_of_at_most(100), pytest.raises(tokopt.TokoptError, match="cannot be written"):
        context = Context(observers=(dump_to(tmp_path / "dumps"),))
        tokopt.parse("tome{r=1}").run(vision(), context)
    assert not os.listdir(tmp_path / "dumps")


def test_a_reproducer_on_a_full_disk_does_not_hide_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("the bug")

    pipeline = tokopt.parse("tome{r=1}")
    monkeypatch.setattr(type(pipeline.passes[0]), "run", fail)
    with (
        files_of_at_most(100),
        pytest.raises(PassError, match=r"the bug.*no reproducer: .*cannot be written"),
    ):
        pipeline.run(vision(), Context(reproducers=tmp_path / "reproducers"))
    assert not os.listdir(tmp_path / "reproducers")
