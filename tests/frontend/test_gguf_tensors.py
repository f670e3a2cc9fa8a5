"""Tensors of GGUF files are what transformers makes of them, and are expanded one by one when they are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as loading

from tokopt.frontend import gguf as tensors
from tokopt.frontend.gguf import expanded, expanded_one_by_one

KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0)

ARCHITECTURES = {"llama": "llama", "gpt2": "gpt2", "gemma2": "gemma2", "qwen2moe": "qwen2_moe"}
"""Architecture in the file -> type of the model: rows are permuted, turned, moved by 1, and experts stacked."""


def model_of(kind: str) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, intermediate_size=32, head_dim=8, **sizes)
    for name, size in (
        ("num_experts", 2),
        ("moe_intermediate_size", 32),
        ("shared_expert_intermediate_size", 32),
    ):
        if hasattr(config, name):
            setattr(config, name, size)
    return AutoModelForCausalLM.from_config(config)


def written(path: Path, architecture: str, model: Any) -> Path:
    """A file with a random tensor of the right shape for every name of the model; matrices are in blocks of 8 bits."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(64)
    random, shapes = (
        np.random.default_rng(0),
        {name: value.shape for name, value in model.state_dict().items()},
    )
    processor = loading.TENSOR_PROCESSORS[architecture](config={})
    names = loading.get_gguf_hf_weights_map(model, processor)
    for name, known in names.items():
        experts = name.endswith("_exps")
        shape = (2, 32, 32) if experts else shapes[known]
        kind = Kind.Q8_0 if len(shape) > 1 else Kind.F32
        data = gguf.quantize(random.standard_normal(shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight" if experts else name, data, raw_dtype=kind)
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    model = model_of(ARCHITECTURES[architecture])
    path = written(tmp_path / "model.gguf", architecture, model)
    wanted = loading.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    with expanded_one_by_one():
        got = loading.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    assert got["config"] == wanted["config"] and list(got["tensors"]) == list(wanted["tensors"])
    assert {"experts" in name for name in got["tensors"]} == {False, architecture == "qwen2moe"}
    for name, tensor in got["tensors"].items():
        assert torch.equal(tensor[...], wanted["tensors"][name]), name
        assert tensor[...].dtype == torch.float32


def test_nothing_is_expanded_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each has memory of its own, so that it leaves memory by itself."""
    model = model_of("llama")
    path = written(tmp_path / "model.gguf", "llama", model)
    calls: list[int] = []
    expand = gguf.dequantize
    monkeypatch.setattr(
        gguf, "dequantize", lambda data, kind: (calls.append(len(data)), expand(data, kind))[1]
    )
    with expanded_one_by_one():
        got = loading.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert calls == [1]  # rope_freqs, which no name of the model has
    value = got["model.layers.0.self_attn.q_proj.weight"][...]
    assert calls == [1, 32] and value.untyped_storage().nbytes() == value.nbytes


def test_a_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens take seconds; what one reader of it changes, another does not see."""
    path = written(tmp_path / "model.gguf", "llama", model_of("llama"))
    read = loading.load_gguf_checkpoint
    calls: list[Path] = []
    monkeypatch.setattr(
        loading, "load_gguf_checkpoint", lambda path, **given: (calls.append(path), read(path, **given))[1]
    )
    with expanded_one_by_one():
        loading.load_gguf_checkpoint(path)["config"].clear()
        assert loading.load_gguf_checkpoint(path)["config"]["model_type"] == "llama"
    assert calls == [path]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(64,), (7, 64), (3, 5, 64)])
def test_parts_are_the_whole(kind: Kind, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf.quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32), kind)
    monkeypatch.setattr(tensors, "PART", 3 * data.shape[-1] * data.itemsize)
    got = expanded(data, kind)
    assert got.dtype == np.float32 and got.shape == shape
    np.testing.assert_array_equal(got, gguf.dequantize(data, kind))
