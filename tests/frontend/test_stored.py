"""Weights are mapped one by one, so that each leaves memory by itself, and are what transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tokopt.cli.models import read_bundle
from tokopt.frontend.pretrained import load_pretrained
from tokopt.frontend.stored import expansion_note, stored_tensors

transformers = pytest.importorskip("transformers")

DTYPES = ("float32", "bfloat16", "float16")


def folder(root: Path, dtype: str) -> Path:
    """A tiny Llama, stored in a dtype."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(root / dtype)
    return root / dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_has_memory_of_its_own_and_the_numbers_of_the_file(tmp_path: Path, dtype: str) -> None:
    path = folder(tmp_path, dtype)
    loaded, _ = load_pretrained(path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name]) and value.dtype == torch.float32, name
        assert value.untyped_storage().nbytes() == value.nbytes, f"{name} keeps others in memory"


def test_a_loaded_model_writes_into_copies_of_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path, "float32")
    file = path / "model.safetensors"
    before = file.read_bytes()
    loaded, _ = load_pretrained(path)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert not loaded.lm_head.weight.any() and file.read_bytes() == before


def test_other_dtypes_and_empty_tensors_are_left_to_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_file(
        {"a": torch.ones(3, 2).half(), "b": torch.ones(2, dtype=torch.int32), "c": torch.ones(0, 4)}, file
    )
    found = stored_tensors(file)
    assert list(found) == ["a"] and found["a"].get_shape() == [3, 2] and found["a"].get_dtype() == "F16"
    assert torch.equal(found["a"][...], torch.ones(3, 2).half())
    assert torch.equal(found["a"][1:], torch.ones(2, 2).half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_user_is_told_of_weights_that_are_expanded(tmp_path: Path, dtype: str) -> None:
    path, said = folder(tmp_path, dtype), list[str]()
    note = expansion_note(path)
    assert (note is None) == (dtype == "float32") and (note is None or f"stored in {dtype} are" in note)
    if dtype == "bfloat16":
        read_bundle(str(path), say=said.append)
        assert said == [note]
