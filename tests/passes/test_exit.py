"""The laws of early exit: what is fitted, what is promised, what is refused, and what it composes with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tokopt
from tests.matrix.language import bundle as language_bundle
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tokopt.errors import PassError, PassRefused, PipelineSyntaxError
from tokopt.ir.bundle import Bundle
from tokopt.passes.exit.calibrate import collect, divide, least_to_fit
from tokopt.passes.exit.exit import Exit
from tokopt.passes.exit.stages import cut_stages
from tokopt.pipeline.base import Context
from tokopt.pipeline.manager import parse
from tokopt.runtime import load

VIT = "vit"
CALIBRATION = [tuple(ZOO[VIT].inputs(batch=50, seed=seed).values()) for seed in range(16)]
"""800 inputs."""

RULES = ("entropy", "margin", "uncertainty", "patience")


def exits(text: str, name: str = VIT) -> Bundle:
    return tokopt.optimize(captured(name), text, strict=True, calibration=CALIBRATION)


def fresh_rows(count: int = 300) -> dict[str, torch.Tensor]:
    return ZOO[VIT].inputs(batch=count, seed=99)


def disagreement(made: Bundle) -> float:
    """The share of rows with another likeliest class than the full model."""
    inputs = fresh_rows()
    full = captured(VIT)(*inputs.values())[1]
    early = made.staged(inputs).outputs["pooler_output"]
    return float((full.argmax(1) != early.argmax(1)).float().mean())


@pytest.mark.parametrize("rule", RULES)
def test_a_tolerance_is_kept_on_rows_that_were_not_seen(rule: str) -> None:
    made = exits(f"exit{{after=[1,2] rule={rule} tolerance=0.35}}")
    depths = made.staged(fresh_rows()).depths
    assert bool((depths < 3).any())
    assert disagreement(made) <= 0.4  # the tolerance, and what 300 rows may be off
    fitted, chosen, promised = made.history[-1].notes[-3:]
    counts = [
        int(n)
        for n in re.findall(r"of 400 inputs (\d+) after 1 block, (\d+) after 2 blocks, (\d+) at", chosen)[0]
    ]
    assert sum(counts) == 400
    errors = int(re.match(r"of 400 inputs that fitted nothing (\d+) disagree", promised)[1])  # type: ignore[index]
    assert errors <= 0.35 * 400 and "with confidence 0.95 at most 35 % of such inputs do" in promised
    assert "by 120 others" in fitted


def test_features_converge() -> None:
    made = exits("exit{after=[1,2] rule=convergence tolerance=0.05}")
    inputs = fresh_rows()
    full, early = captured(VIT)(*inputs.values())[1], made.staged(inputs)
    assert 1 - float(torch.cosine_similarity(full, early.outputs["pooler_output"]).mean()) <= 0.06
    assert set(early.depths.tolist()) <= {2, 3}  # there is nothing before the first exit to compare with
    chosen, promised = made.history[-1].notes[-2:]
    assert "of convergence on pooler_output: of" in chosen
    assert "the mean cosine distance from the full model is" in promised


@pytest.mark.parametrize("rule", RULES)
def test_rows_do_not_see_each_other(rule: str) -> None:
    """Neither the rows that left before nor those that wait; counts of agreement go with their row."""
    made = exits(f"exit{{after=[1,2] rule={rule} tolerance=0.35}}")
    inputs = fresh_rows(24)
    together = made.staged(inputs)
    assert len(set(together.depths.tolist())) > 1
    for row in range(24):
        alone = made.staged({name: value[row : row + 1] for name, value in inputs.items()})
        assert alone.depths.tolist() == [int(together.depths[row])]
        for name, value in alone.outputs.items():
            torch.testing.assert_close(value[0], together.outputs[name][row], atol=1e-5, rtol=1e-4)


def test_fitted_heads_are_nearer_to_the_model_than_its_own() -> None:
    inputs = fresh_rows()
    full = captured(VIT)(*inputs.values())
    near = {}
    for fit in ("own", "ridge"):
        made = exits(f"exit{{after=[1] rule=convergence threshold=0.5 fit={fit}}}").staged(inputs, depth=1)
        near[fit] = [float((a - b).square().mean()) for a, b in zip(full, made.outputs.values(), strict=True)]
    assert all(a < 0.9 * b for a, b in zip(near["ridge"], near["own"], strict=True))


def test_labels_are_what_logistic_regression_learns(tmp_path: Path) -> None:
    """Labels that any block can tell: whether the first output is above its median; a head finds them again."""
    rows = torch.cat([captured(VIT)(*sample)[1] for sample in CALIBRATION])
    classes = rows.shape[1]
    labels = (rows[:, 0] > rows[:, 0].median()).long() * (classes - 1)
    save_file({"labels": labels}, tmp_path / "labels.safetensors")
    text = f'exit{{after=[2] threshold=0 fit=logistic labels="{tmp_path / "labels.safetensors"}"}}'
    inputs = fresh_rows()
    made = exits(text).staged(inputs, depth=2).outputs["pooler_output"].argmax(1)
    wanted = (captured(VIT)(*inputs.values())[1][:, 0] > rows[:, 0].median()).long() * (classes - 1)
    assert float((made == wanted).float().mean()) > 0.75


def test_heads_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    stages = cut_stages(captured(VIT).main, (1, 2))
    own = stages.tail.fitted[1].own
    tensors = {}
    for depth in (1, 2):
        tensors[f"{depth}.weight"] = torch.randn(own.weight.shape, generator=generator)
        tensors[f"{depth}.bias"] = torch.randn(own.bias.shape, generator=generator)
    tensors["2.temperature"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "heads.safetensors")
    made = exits(f'exit{{after=[1,2] threshold=0 heads="{tmp_path / "heads.safetensors"}"}}')
    inputs = fresh_rows(5)
    probes, links = stages.probes()
    records = collect(captured(VIT), probes, links, stages.tail, [tuple(inputs.values())])
    for place, depth in enumerate((1, 2)):
        wanted = records.features[place][1] @ tensors[f"{depth}.weight"].T + tensors[f"{depth}.bias"]
        got = made.staged(inputs, depth=depth).outputs["pooler_output"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "must have '1.weight' of shape .56, 56., and has no such tensor"),
        ({"1.weight": torch.ones(2, 2)}, "and has one of shape .2, 2."),
        (
            {"1.weight": torch.full((56, 56), torch.nan), "1.bias": torch.ones(56)},
            "'1.weight' of .* holds NaN or infinity",
        ),
        (
            {"1.weight": torch.eye(56), "1.bias": torch.ones(56), "1.temperature": torch.tensor(0.0)},
            "a temperature is above 0",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "heads.safetensors")
    with pytest.raises(PassError, match=message):
        exits(f'exit{{after=[1] threshold=0 heads="{tmp_path / "heads.safetensors"}"}}')


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="cannot be read"):
        exits(f'exit{{after=[1] threshold=0 heads="{tmp_path / "missing.safetensors"}"}}')


# --- refusals -----------------------------------------------------------------------------------------------


def test_too_few_inputs_for_the_promise_are_refused_with_the_number_needed() -> None:
    few = CALIBRATION[:11]  # 550, of which 275 are for the promise
    with pytest.raises(PassError, match=r"takes 299 inputs .* so 596 calibration inputs, and there are 550"):
        tokopt.optimize(captured(VIT), "exit{after=[1]}", calibration=few)
    with pytest.raises(PassError, match=r"takes 299 inputs .* so 351 calibration inputs, and there are 300"):
        tokopt.optimize(captured(VIT), "exit{after=[1] fit=own}", calibration=CALIBRATION[:6])


def test_a_promise_that_cannot_be_kept_changes_nothing() -> None:
    text = "exit{after=[1] tolerance=0.01 fit=own}"
    _, report = parse(text).run(captured(VIT), Context(calibration=CALIBRATION))
    (record,) = report.records
    assert not record.matches
    assert re.search(
        r"no threshold of entropy lets a row leave early and keeps a tolerance of 0.01",
        str(record.refusals[0]),
    )
    same = tokopt.optimize(captured(VIT), text, calibration=CALIBRATION)
    assert same.programs == captured(VIT).programs and same.semantics == "exact"


def test_calibration_is_asked_for() -> None:
    with pytest.raises(PassError, match="exit needs inputs to calibrate with"):
        tokopt.optimize(captured(VIT), "exit{after=[1]}")
    with pytest.raises(PassError, match="the calibration data is empty"):
        tokopt.optimize(captured(VIT), "exit{after=[1]}", calibration=[])
    few = [tuple(ZOO[VIT].inputs(batch=3).values())]
    with pytest.raises(
        PassError, match=r"takes 59 inputs .* so 116 calibration inputs, and there are 3; give"
    ):
        tokopt.optimize(captured(VIT), "exit{after=[1] tolerance=0.05}", calibration=few)
    with pytest.raises(PassError, match="3 calibration inputs are too few to fit heads to; give at least"):
        tokopt.optimize(captured(VIT), "exit{after=[1] threshold=0.5}", calibration=few)


@pytest.mark.parametrize("promises", [False, True])
def test_the_fewest_inputs_that_heads_are_fitted_to(promises: bool) -> None:
    count = least_to_fit(2, promises=promises)
    enough = [divide(n, fits=True, promises=promises).fit_at_least(2) for n in (count - 1, count)]
    assert enough == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit{after=[]}", "must be numbers of blocks that grow"),
        ("exit{after=[2,1]}", "must be numbers of blocks that grow"),
        ("exit{after=[0,1]}", "must be numbers of blocks that grow"),
        ("exit{after=[1] tolerance=0}", "tolerance=0 must be between 0 and 1"),
        ("exit{after=[1] confidence=1.0}", "confidence=1.0 must be between 0 and 1"),
        ("exit{after=[1] rule=convergence fit=logistic}", "fit=logistic is for rules about classes"),
        ('exit{after=[1] labels="a"}', "labels are for fit=logistic"),
        (
            "exit{after=[3] threshold=0 fit=own}",
            "the model has 3 blocks, so that a row can leave early after 2 of them at most",
        ),
        ("exit{after=[1] threshold=0 fit=own},exit{after=[1] threshold=0 fit=own}", "use the pass once"),
    ],
)
def test_options_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises((PassError, PipelineSyntaxError), match=message):
        tokopt.optimize(captured(VIT), text, calibration=CALIBRATION)


def test_language_models_are_sent_elsewhere() -> None:
    with pytest.raises(
        PassError, match=r"exit is for encoders; in a language model skipdecode .* drop_blocks"
    ):
        tokopt.optimize(language_bundle("llama"), "exit{after=[1] threshold=0 fit=own}")


def test_an_output_may_be_named() -> None:
    made = exits("exit{after=[1] threshold=0 fit=own output=pooler_output}")
    assert made.exits
    with pytest.raises(
        PassRefused, match="none of the outputs last_hidden_state, pooler_output is 'other' of that form"
    ):
        exits("exit{after=[1] threshold=0 fit=own output=other}")
    with pytest.raises(PassRefused, match="is 'last_hidden_state' of that form"):
        exits("exit{after=[1] threshold=0 fit=own output=last_hidden_state}")


def test_its_text_is_its_repr() -> None:
    made = Exit((1, 2), "margin", threshold=0.5)
    assert str(made) == "exit{after=[1,2] rule=margin threshold=0.5}"
    assert parse(str(made)).passes == (made,)


# --- composition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", ['rtn{group=16 only=["*attention*"]}', "int8", "cast{dtype=float16}"])
def test_stages_are_quantized_like_any_program(others: str, tmp_path: Path) -> None:
    """Before and after: stages are programs, and a quantized model is cut like any other."""
    inputs = fresh_rows(6)
    for text in (
        f"exit{{after=[1,2] threshold=2.0}},{others}",
        f"{others},exit{{after=[1,2] threshold=2.0}}",
    ):
        made = exits(text)
        assert made.history[-1].matches and made.exits
        wanted = made.staged(inputs)
        model = load(tokopt.export(made, tmp_path / "made.tokopt", overwrite=True))
        got = model.run(*(value.numpy() for value in inputs.values()))
        assert got.depths is not None and got.depths.shape == wanted.depths.shape
        assert tokopt.verify(tmp_path / "made.tokopt").ok


def test_tokens_are_merged_within_the_stages(tmp_path: Path) -> None:
    """A pass that merges tokens after the exits were put gives every stage all tokens back."""
    text = "exit{after=[1] rule=convergence threshold=1.0 fit=own}"
    made = tokopt.optimize(captured(VIT), f"{text},tome{{r=4}}", strict=True)
    assert made.history[-1].matches == 3
    inputs = fresh_rows(4)
    wanted = made.staged(inputs)
    model = load(tokopt.export(made, tmp_path / "made.tokopt"))
    got = model.run(*(value.numpy() for value in inputs.values()))
    for name, value in wanted.outputs.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, atol=1e-4, rtol=1e-3)
