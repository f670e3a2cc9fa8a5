"""A GGUF file is a model like a folder: its weights, tokenizer, chat template and stop tokens, and its own grid."""

from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel

import tokopt
from tokopt.analysis.constants import evaluate
from tokopt.errors import CaptureError
from tokopt.ir.graph import aten, is_call, operand_at
from tokopt.runtime import load

WIDTH, HEADS, INNER, LAYERS = 64, 2, 96, 2

TOKENS = ["<|end|>", *sorted(ByteLevel.alphabet()), "Ġa", "bc"]

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write(path: Path, head: Kind | None) -> Path:
    """A Llama of two layers whose linears lie in blocks of 4 bits with minima, and whose tokenizer is of bytes.

    ``head`` is the kind of the output projection's blocks; None: it is tied to the embedding.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["Ġ a", "b c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: Kind = Kind.Q4_1) -> None:
        values = random.standard_normal(shape).astype(np.float32) * 0.2
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), WIDTH, kind=Kind.Q8_0 if head is None else Kind.Q4_1)
    if head is not None:
        add("output.weight", len(TOKENS), WIDTH, kind=head)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}.weight", WIDTH, WIDTH)
        for name, shape in (
            ("ffn_gate", (INNER, WIDTH)),
            ("ffn_up", (INNER, WIDTH)),
            ("ffn_down", (WIDTH, INNER)),
        ):
            add(f"{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf", None)


@pytest.fixture(scope="module")
def bundle(file: Path) -> tokopt.Bundle:
    return tokopt.capture_lm(file)


def test_what_the_file_says_of_text_is_the_models(bundle: tokopt.Bundle) -> None:
    """Context, vocabulary, stop token, template and tokenizer."""
    assert bundle.generation is not None
    assert (bundle.generation.context, bundle.generation.vocabulary) == (128, len(TOKENS))
    assert bundle.generation.eos == (0,)
    assert bundle.generation.chat_template == TEMPLATE


def test_weights_are_those_of_the_file(file: Path, bundle: tokopt.Bundle) -> None:
    """Every tensor that no layout changes is the one that the format's own package expands."""
    held = {name: value for name, value in bundle.main.module.state_dict().items() if value.ndim == 2}
    for tensor in gguf.GGUFReader(file).tensors:
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name or tensor.data.ndim != 2:
            continue  # llama.cpp interleaves the rows of rotated heads
        wanted = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        assert any(value.shape == wanted.shape and torch.equal(value, wanted) for value in held.values()), (
            tensor.name
        )


def test_keep_grid_finds_every_block_and_the_artifact_talks(bundle: tokopt.Bundle, tmp_path: Path) -> None:
    """The whole way from the file to text, with no linear left in float32."""
    kept = tokopt.optimize(bundle, "keep_grid", strict=True)  # refuses no linear
    model = load(tokopt.export(kept, tmp_path / "tiny.tokopt"))
    assert model.chat_prompt([{"role": "user", "content": " abc"}]) == model.tokenizer.encode(" abc")
    assert len(model.generate(" abc", max_tokens=4).tokens) <= 4


def test_an_untied_embedding_is_gathered_from_its_blocks(tmp_path: Path) -> None:
    """Nothing of the table is left in float32; its rows are those of the file, bit for bit."""
    file = write(tmp_path / "untied.gguf", Kind.Q8_0)
    kept = tokopt.optimize(tokopt.capture_lm(file), "keep_grid", strict=True)
    assert not any("left in float" in note for note in kept.history[-1].notes)
    (stored,) = (one for one in gguf.GGUFReader(file).tensors if one.name == "token_embd.weight")
    (node,) = (node for node in kept.main.module.graph.nodes if is_call(node, aten.embedding))
    table = evaluate(kept.main.module, operand_at(node, 0), {})
    assert torch.equal(table, torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type))))
    path = tokopt.export(kept, tmp_path / "untied.tokopt")
    for form in path.glob("*.onnx"):
        graph = onnx.load(form, load_external_data=False).graph
        assert [node.op_type for node in graph.node].count("gather_weight_4_minimum") == 1
        floats = [one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
        assert all(np.prod(one.dims) < len(TOKENS) * WIDTH for one in floats)


def test_a_damaged_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """What transformers says, and which file it was."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CaptureError, match=r"cannot load .*broken\.gguf"):
        tokopt.capture_lm(path)
