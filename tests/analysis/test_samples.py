"""What callers give as samples: however a text or a batch is spelt, passes see the same tensors."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import tokopt
from tests.ir.toys import chained
from tests.matrix import language
from tests.runtime.test_conversation import tokenizer
from tokopt.analysis.calibration import Moments
from tokopt.analysis.samples import read_samples
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.passes.quantize.base import in_parts
from tokopt.pipeline.base import Context

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
OTHER = [5, 3, 5]


@cache
def speaker() -> Bundle:
    """A decoder with a tokenizer of one token per letter."""
    return replace(language.bundle("llama"), tokenizer=tokenizer())


@cache
def encoder() -> Bundle:
    return tokopt.capture(nn.Linear(8, 8), (torch.zeros(2, 8),), dynamic={"input": {0: "batch"}})


def tensors(bundle: Bundle, samples: Iterable[Any]) -> list[list[Any]]:
    return [[value.tolist() for value in given.values()] for given in read_samples(bundle, samples)]


def padded(left: bool) -> dict[str, Tensor]:
    rows = [OTHER + [0] * 5, IDS] if not left else [[0] * 5 + OTHER, IDS]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.clone()}


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_text(left: bool) -> None:
    """The rows of a padded batch are the texts without it."""
    assert tensors(speaker(), [BatchEncoding(padded(left))]) == [[[OTHER]], [[IDS]]]


def test_a_batch_without_padding_stays_one() -> None:
    batch = {"input_ids": torch.tensor([IDS, IDS]), "attention_mask": torch.ones(2, 8), "token_type_ids": 0}
    assert tensors(speaker(), [batch]) == [[[IDS, IDS]]]


@pytest.mark.parametrize(
    "spelt",
    [["abc"], [["abc"]], [("abc",)], [{"text": "abc"}], [{"text": ["abc"], "label": [1]}]],
    ids=["text", "texts", "collated", "row", "rows"],
)
def test_texts_are_read_with_the_tokenizer(spelt: list[Any]) -> None:
    wanted = tensors(speaker(), spelt)
    assert len(wanted) == 1 and len(wanted[0][0][0]) == 3


def test_files_are_read_in_windows(tmp_path: Path) -> None:
    """Windows of a file are those of its text, and together they are all of it."""
    path, text = tmp_path / "a.txt", "abcdefgh" * 300
    path.write_text(text)
    windows = tensors(speaker(), [path])
    assert windows == tensors(speaker(), [str(path)]) == tensors(speaker(), [text])
    assert len(windows) > 1
    whole = [token for window in windows for token in window[0][0]]
    assert len(whole) == len(text)


def test_loaders_give_labels_too() -> None:
    inputs, labels = torch.randn(5, 8), torch.arange(5)
    for loader in (
        DataLoader(TensorDataset(inputs), batch_size=2),
        DataLoader(TensorDataset(inputs, labels), batch_size=2),
        [{"input": inputs[:2].numpy(), "labels": labels[:2]}, inputs[2:4], (inputs[4:],)],
    ):
        rows = [row for given in read_samples(encoder(), loader) for row in given["input"]]
        assert torch.equal(torch.stack(rows), inputs)
    texts = torch.tensor([IDS, IDS[::-1]])
    loader = DataLoader(TensorDataset(texts, torch.arange(2)))
    assert tensors(speaker(), loader) == [[[IDS]], [[IDS[::-1]]]]


def test_optimize_takes_a_file_and_a_loader(tmp_path: Path) -> None:
    """A lone path is the data, and a loader is read once for every pass."""
    path = tmp_path / "a.md"
    path.write_text("abcd" * 8)
    texts = next(iter(read_samples(speaker(), [path])))["tokens"]
    made = [
        tokopt.optimize(speaker(), "smoothquant,gptq{group=16}", calibration=samples)(texts)[0]
        for samples in (path, DataLoader(TensorDataset(texts)))
    ]
    assert torch.equal(*made)
    assert list(Context(calibration=path).samples("gptq")) == [path]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("a.txt", "there is no file a.txt"),
        ({"input_ids": [IDS], "attention_mask": [[0] * 8]}, "is no text: give token ids below"),
        ({"input_ids": [IDS], "attention_mask": [[1] * 7]}, r"ids of shape \[1, 8\] and a mask of \[1, 7\]"),
        ({"labels": [IDS]}, "has labels, the model takes tokens"),
        ({}, "has nothing, the model takes tokens"),
        ([torch.tensor(IDS), torch.tensor(OTHER)], "one behind the inputs looks like them"),
        ([np.array([IDS]), np.array([OTHER])], "one behind the inputs looks like them"),
        (
            {"input_ids": [IDS], "attention_mask": [[0.0] * 3 + [-1e9] * 5]},
            "other numbers than 1 for a token",
        ),
        ({"input_ids": [IDS], "attention_mask": [[float("nan")] * 8]}, "other numbers than 1 for a token"),
    ],
)
def test_what_a_language_model_cannot_read_is_refused(sample: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tensors(speaker(), [sample])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("a text", "is a text, and the model takes input; give its tensors"),
        ([], "has nothing, the model takes input"),
        ((torch.zeros(2, 8), torch.zeros(2, 8)), "one behind the inputs looks like them"),
        ((torch.zeros(2, 8).to_sparse(), [[1], [2, 3]]), "no array of numbers"),
        (torch.zeros(2, 8, device="meta"), "no array of numbers"),
        ({"inputs": np.zeros((2, 8), np.float32)}, "has inputs, the model takes input"),
        ({"input": torch.zeros(2, 8), "attention_mask": torch.tensor([1, 0])}, "takes no attention_mask"),
    ],
)
def test_what_an_encoder_cannot_read_is_refused(sample: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tensors(encoder(), [sample])


def test_a_bundle_without_a_tokenizer_says_so() -> None:
    with pytest.raises(InputError, match="no tokenizer to read text with"):
        tensors(language.bundle("llama"), ["abc"])


def test_ids_are_of_any_type_of_whole_numbers() -> None:
    """Files of tokens hold uint16."""
    for kind in (np.uint8, np.uint16, np.uint32, np.uint64, np.int32):
        assert tensors(speaker(), [np.array(IDS, kind)]) == [[[IDS]]]
    with pytest.raises(InputError, match="give token ids below"):
        tensors(speaker(), [np.array([2**64 - 1], np.uint64)])


def test_labels_that_are_no_tensors_are_left_out() -> None:
    x = torch.zeros(2, 8)
    for label in ([[1], [2, 3]], None, {"a": 1}, ["a", "b"]):
        assert tensors(encoder(), [(x, label)]) == [[x.tolist()]]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_gives_no_numbers_calibrates_nothing(number: float) -> None:
    """A scale of such inputs would be arbitrary, and no error would say so."""
    with pytest.raises(InputError, match="gives a layer inputs that are NaN or infinite"):
        Moments.empty(8).add(torch.full((2, 8), number))


def beside_tokens(bundle: Bundle) -> list[tuple[Any, Tensor]]:
    """What a bundle takes beside tokens, and an example of each."""
    known = [
        pair for made in bundle.programs.values() for pair in zip(made.inputs, made.example, strict=True)
    ]
    return [(spec, value) for spec, value in known if spec.role == "input"]


def test_a_text_takes_its_row_of_what_is_read_beside_it() -> None:
    """Images, for example: of a padded batch every text has its own."""
    bundle = chained()
    beside = {
        spec.name: torch.stack([torch.full_like(value[0], row) for row in (0, 1)])
        for spec, value in beside_tokens(bundle)
    }
    ids = torch.tensor([[0, 3, 5], [2, 1, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]), **beside}
    texts = list(read_samples(bundle, [batch]))
    assert [given["tokens"].tolist() for given in texts] == [[[3, 5]], [[2, 1, 4]]]
    for name, value in beside.items():
        assert [given[name].unique().tolist() for given in texts] == [[0.0], [1.0]], name
        assert torch.equal(texts[1][name], value[1:])


def test_a_search_counts_the_texts_that_hold_something(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tuning needs at least two samples"):
        tokopt.tune(speaker(), ["", "abc"], tmp_path / "t", candidates=[["rtn"]])
    assert not (tmp_path / "t").exists()


def test_one_file_of_text_is_enough_for_a_search(tmp_path: Path) -> None:
    """Its windows are the samples, of which half calibrate and half judge."""
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 300)
    found = tokopt.tune(speaker(), [path], tmp_path / "t", candidates=[["rtn"]], minutes=0)
    assert found.untried == ("rtn",)


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (1, 32), (3, 1)])
def test_a_weight_in_parts_is_that_weight(shape: tuple[int, int]) -> None:
    assert torch.equal(torch.cat(in_parts(torch.ones(shape))), torch.ones(shape))
