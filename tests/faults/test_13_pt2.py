"""Checking a ``.pt2`` file opens nothing, and opening it executes nothing out of it.

``verify`` and ``open_bundle`` gave whatever a file held to torch's reader, which unpickles entries marked as pickles,
and executes more than these. The law: ``verify`` reads hashes; whatever torch would execute is refused before torch
sees it.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import tokopt
from tests.lower.encoders import text, vision
from tests.matrix.language import bundle as decoder
from tests.runtime.artifacts import rehash
from tokopt.errors import ArtifactError, CaptureError
from tokopt.frontend.pt2 import load_pt2
from tokopt.ir.assemble import assemble

Entries = dict[str, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokopt.export(vision(), tmp_path_factory.mktemp("whole") / "a.tokopt", target="torch")


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def save(path: Path, entries: Entries) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


class Mark:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (f"open({str(self.path)!r}, 'w')",)

    @property
    def saved(self) -> bytes:
        stream = io.BytesIO()
        torch.save(self, stream)
        return stream.getvalue()

    @property
    def code(self) -> str:
        return f"open({str(self.path)!r}, 'w')"


def edit(entries: Entries, end: str, change: Callable[[Any], object]) -> None:
    """Change the JSON of the entry whose name ends so."""
    name = next(name for name in entries if name.endswith(end))
    value = json.loads(entries[name])
    change(value)
    entries[name] = json.dumps(value).encode()


def edit_text(entries: Entries, old: str, new: str) -> None:
    name = next(name for name in entries if name.endswith("models/model.json"))
    source = entries[name].decode()
    assert old in source
    entries[name] = source.replace(old, new).encode()


def quoted(code: str) -> str:
    return json.dumps(code)[1:-1]


def a_pickled_weight(entries: Entries, mark: Mark) -> None:
    def change(config: Any) -> None:
        config["config"]["model.cls"]["use_pickle"] = True

    edit(entries, "model_weights_config.json", change)
    entries["a/data/weights/weight_0"] = mark.saved


def a_pickled_constant(entries: Entries, mark: Mark) -> None:
    meta = {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(entries, "model_constants_config.json", lambda config: config["config"].update(x=meta))
    entries["a/data/constants/tensor_0"] = mark.saved


def a_pickled_object(entries: Entries, mark: Mark) -> None:
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(entries, "model_constants_config.json", lambda config: config["config"].update(x=meta))
    entries["a/data/constants/opaque_obj_0"] = pickle.dumps(mark)


def an_object_that_says_it_is_no_pickle(entries: Entries, mark: Mark) -> None:
    """Its name alone has it unpickled."""
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    edit(
        entries,
        "model_weights_config.json",
        lambda config: meta.update(tensor_meta=config["config"]["model.cls"]["tensor_meta"]),
    )
    edit(entries, "model_constants_config.json", lambda config: config["config"].update(x=meta))
    entries["a/data/constants/opaque_obj_0"] = pickle.dumps(mark)


def weights_of_an_older_format(entries: Entries, mark: Mark) -> None:
    entries["a/data/weights/model.pt"] = mark.saved


def constants_of_an_older_format(entries: Entries, mark: Mark) -> None:
    entries["a/data/constants/model.pt"] = mark.saved


def an_archive_of_an_older_format(entries: Entries, mark: Mark) -> None:
    """torch falls back to it when it cannot read the newer one."""
    program = next(data for name, data in entries.items() if name.endswith("models/model.json"))
    entries.clear()
    entries["version"] = b"8.15"
    entries["serialized_exported_program.json"] = program
    for name in ("state_dict", "constants", "example_inputs"):
        entries[f"serialized_{name}.pt"] = mark.saved


def example_inputs(entries: Entries, mark: Mark) -> None:
    entries["a/data/sample_inputs/model.pt"] = mark.saved


def a_size(entries: Entries, mark: Mark) -> None:
    symbol = "Symbol('s32', positive=True, integer=True)"
    edit_text(entries, symbol, quoted(f"{symbol} + 0 * len(str({mark.code}))"))


def a_size_within_a_function(entries: Entries, mark: Mark) -> None:
    """What is given to it as a text is evaluated once more."""
    symbol = "Symbol('s32', positive=True, integer=True)"
    edit_text(entries, symbol, quoted(f"Max({symbol}, {mark.code!r})"))


def a_function_of_pythons(entries: Entries, mark: Mark) -> None:
    """A node that calls what it names, with the texts that it has."""

    def change(program: Any) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.system"
        node["inputs"] = [{"name": "", "arg": {"as_string": f"touch {mark.path}"}, "kind": 1}]

    edit(entries, "models/model.json", change)


def a_name_in_the_source(entries: Entries, mark: Mark) -> None:
    """Names of inputs are written into the source of ``forward`` as they are."""
    program = next(data for name, data in entries.items() if name.endswith("models/model.json"))
    last = json.loads(program)["graph_module"]["signature"]["input_specs"][-1]
    given = last["user_input"]["arg"]["as_tensor"]["name"]
    edit_text(entries, f'"{given}"', json.dumps(f"{given}=1, _x={mark.code}"))


def a_compiled_library(entries: Entries, mark: Mark) -> None:
    entries["a/data/aotinductor/model/model.so"] = b"\x7fELF"


def what_a_container_makes(entries: Entries, mark: Mark) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}

    def change(program: Any) -> None:
        calls = program["graph_module"]["module_call_graph"]
        calls[0]["signature"]["in_spec"] = json.dumps([1, tree])

    edit(entries, "models/model.json", change)


ATTACKS = [
    a_pickled_weight,
    a_pickled_constant,
    a_pickled_object,
    an_object_that_says_it_is_no_pickle,
    weights_of_an_older_format,
    constants_of_an_older_format,
    an_archive_of_an_older_format,
    example_inputs,
    a_size,
    a_size_within_a_function,
    a_function_of_pythons,
    a_name_in_the_source,
    a_compiled_library,
    what_a_container_makes,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_is_executed(attack: Callable[[Entries, Mark], None], whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "a.tokopt"))
    mark = Mark(tmp_path / "mark")
    entries = {f"a/{name.partition('/')[2]}": data for name, data in entries_of(path / "forward.pt2").items()}
    attack(entries, mark)
    save(path / "forward.pt2", entries)
    rehash(path)
    assert tokopt.verify(path).ok  # the files are those that the manifest lists, and none is opened
    for call, error in (
        (lambda: tokopt.open_bundle(path), ArtifactError),
        (lambda: tokopt.capture(path / "forward.pt2"), CaptureError),
    ):
        with pytest.raises(error, match="is not loaded") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not mark.path.exists()


def test_the_attacks_are_real(whole: Path, tmp_path: Path) -> None:
    """torch executes them: those that need nothing but loading."""
    executed = []
    for attack in ATTACKS:
        mark = Mark(tmp_path / attack.__name__)
        entries = {
            f"a/{name.partition('/')[2]}": data for name, data in entries_of(whole / "forward.pt2").items()
        }
        attack(entries, mark)
        save(tmp_path / "a.pt2", entries)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.load(tmp_path / "a.pt2").module(check_guards=False)
        executed += [attack] if mark.path.exists() else []
    assert len(executed) >= 8, [attack.__name__ for attack in executed]


@pytest.mark.parametrize("make", [vision, text, lambda: decoder("llama")])
def test_programs_of_tensors_are_loaded(make: Callable[[], tokopt.Bundle], tmp_path: Path) -> None:
    for name, program in make().programs.items():
        torch.export.save(assemble(program), tmp_path / f"{name}.pt2")
        load_pt2(tmp_path / f"{name}.pt2")


def test_a_flipped_bit_is_found(whole: Path, tmp_path: Path) -> None:
    """torch does not look at the checksums of an archive's entries; a bare file has no manifest."""
    data = bytearray((whole / "forward.pt2").read_bytes())
    infos = zipfile.ZipFile(whole / "forward.pt2").infolist()
    at = next(info.header_offset for info in infos if info.filename.endswith("weight_8"))
    data[at + 4096] ^= 1
    path = tmp_path / "a.pt2"
    path.write_bytes(data)
    torch.export.load(path)
    with pytest.raises(CaptureError, match="is damaged in"):
        tokopt.capture(path)
