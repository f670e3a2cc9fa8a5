"""Damaged ``.pt2`` files: bytes, which their checksums tell, and entries whose checksums are right."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch.nn import functional

import tokopt
from tests.attack.case import Kind
from tests.attack.damage import change_meaning, damage_bytes, damage_json
from tokopt.ir.assemble import assemble


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v)


def _write(path: Path) -> Path:
    torch.manual_seed(0)
    bundle = tokopt.capture(_Attention().eval(), (torch.randn(2, 5, 8),))
    torch.export.save(assemble(bundle.main), path)
    return path


def _behaviour(path: Path) -> str:
    bundle = tokopt.capture(path)
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for tensor in bundle(torch.randn(3, 5, 8, generator=generator)):
        digest.update(str(tensor.shape).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def prepare_bytes(folder: Path) -> Callable[[Random, Path], bool]:
    whole = _write(folder / "whole.pt2")
    known, data = _behaviour(whole), whole.read_bytes()

    def run(rng: Random, scratch: Path) -> bool:
        (scratch / "a.pt2").write_bytes(damage_bytes(rng, data))
        return _behaviour(scratch / "a.pt2") == known

    return run


def prepare_entries(folder: Path) -> Callable[[Random, Path], bool]:
    whole = _write(folder / "whole.pt2")
    known = _behaviour(whole)
    with zipfile.ZipFile(whole) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    def run(rng: Random, scratch: Path) -> bool:
        changed = _change(rng, entries)
        with zipfile.ZipFile(scratch / "a.pt2", "w", zipfile.ZIP_STORED) as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        return _behaviour(scratch / "a.pt2") == known

    return run


def _change(rng: Random, entries: dict[str, bytes]) -> dict[str, bytes]:
    made, name = (
        dict(entries),
        rng.choice([name for name in entries if rng.random() < 0.5 or name.endswith(".json")]),
    )
    if rng.random() < 0.1:
        made[rng.choice([*made, "x/extra/a", "x/data/weights/weight_99"])] = made.pop(name)
    elif name.endswith(".json"):
        damage = damage_json if rng.random() < 0.3 else change_meaning
        made[name] = json.dumps(damage(rng, json.loads(made[name]), rng.choice((1, 1, 3)))).encode()
    else:
        made[name] = damage_bytes(rng, made[name] or b"0")
    return made


BYTES = Kind("pt2 bytes", prepare_bytes)
ENTRIES = Kind("pt2 entries", prepare_entries, other=True)
