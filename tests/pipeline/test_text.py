"""Pipeline text: parsing and printing are inverse; bad text raises PipelineSyntaxError and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokopt.errors import PipelineSyntaxError
from tokopt.passes import PASSES, load_pass
from tokopt.passes.kv.base import KVEviction
from tokopt.passes.kv.snapkv import SnapKV
from tokopt.passes.kv.tova import TOVA
from tokopt.passes.reduce.tome import ToMe
from tokopt.pipeline.base import Pass, option_text
from tokopt.pipeline.manager import Pipeline, as_pipeline, parse
from tokopt.pipeline.text import Reader, format_value


@dataclass(frozen=True)
class Still(Pass):
    """A pass that can do without options, of a family of its own."""

    word: str = "a"
    number: float = 0.5

    name: ClassVar[str] = "still"


_TOVA = TOVA(budget=64)


@dataclass(frozen=True)
class Wrap(Pass):
    """A pass whose options are passes: one that must be given, one of a family, one or a word, a list of them."""

    inner: Pass
    press: KVEviction = _TOVA
    other: Literal["same"] | Still | None = None
    more: tuple[Pass, ...] = ()

    name: ClassVar[str] = "wrap"


@pytest.fixture(autouse=True, scope="module")
def toys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for cls in (Still, Wrap):
            patch.setitem(PASSES, cls.name, f"{__name__}:{cls.__name__}")
        yield


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True).filter(
    lambda word: word not in ("true", "false", "none")
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | names
    | st.text(max_size=12)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8)

pipelines = st.lists(
    st.one_of(
        st.builds(lambda r: f"tome{{r={r}}}", st.integers(0, 64)),
        st.builds(lambda keep: f"evit{{keep={keep}}}", st.floats(0.05, 1.0)),
        st.builds(lambda rs: f"pitome{{r={format_value(rs)}}}", st.lists(st.integers(0, 9), min_size=1)),
        st.builds(
            lambda name, layers: f"{name}{{r=2 layers={format_value(layers)}}}",
            st.sampled_from(["tome", "kcenter", "divprune", "random"]),
            st.lists(st.integers(0, 30), min_size=1, unique=True),
        ),
    ),
    max_size=4,
).map(",".join)


stills = st.builds(Still, word=names | st.text(max_size=12), number=st.integers() | st.floats(0, 1))
presses = st.builds(
    SnapKV, budget=st.integers(64, 1024) | st.lists(st.integers(64, 99), min_size=1).map(tuple)
)
nested = st.recursive(
    stills | presses,
    lambda inner: st.builds(
        Wrap,
        inner=inner,
        press=presses,
        other=st.sampled_from([None, "same"]) | stills,
        more=st.lists(inner, max_size=2).map(tuple),
    ),
    max_leaves=4,
)


@given(values)
@example(((((1,),),),))
def test_value_prints_and_parses_back(value: object) -> None:
    reader = Reader(format_value(value))
    parsed = reader.value()
    assert parsed == value and type(parsed) is type(value)
    assert reader.at == len(reader.text)


@given(pipelines)
def test_pipeline_prints_and_parses_back(text: str) -> None:
    pipeline = parse(text)
    assert parse(str(pipeline)) == pipeline
    assert str(parse(str(pipeline))) == str(pipeline)


@given(st.lists(nested, max_size=3).map(tuple))
def test_passes_inside_passes_print_and_parse_back(passes: tuple[Pass, ...]) -> None:
    pipeline = Pipeline(passes)
    assert parse(str(pipeline)) == pipeline
    assert repr(pipeline) == str(pipeline) == ",".join(map(repr, passes))


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("wrap{inner=snapkv{budget=512}}", Wrap(SnapKV(budget=512))),
        ("wrap{inner=wrap{inner=still}}", Wrap(Wrap(Still()))),
        ("wrap{inner=still{word=still}}", Wrap(Still(word="still"))),
        ("wrap{inner=still other=same}", Wrap(Still(), other="same")),
        ("wrap{inner=still other=still}", Wrap(Still(), other=Still())),
        ("wrap{inner=still more=[still,tome{r=2}]}", Wrap(Still(), more=(Still(), ToMe(r=2)))),
    ],
)
def test_a_word_is_a_pass_where_the_option_takes_one(text: str, step: Pass) -> None:
    assert parse(text).passes == (step,)
    assert str(step) == text


@pytest.mark.parametrize("text", ["wrap{inner=still{}}", " wrap { inner = still { } , other=none }"])
def test_braces_without_options_are_a_pass_with_its_defaults(text: str) -> None:
    assert str(parse(text)) == "wrap{inner=still}"


def test_an_option_that_takes_a_pass_is_listed_with_its_type() -> None:
    options = [option_text(Wrap, field) for field in dataclasses.fields(Wrap)]
    assert options == [
        "inner:Pass",
        "press:KVEviction=tova{budget=64}",
        "other:Literal['same'] | Still | None=none",
        "more:tuple[Pass, ...]=[]",
    ]
    assert [option_text(Still, field) for field in dataclasses.fields(Still)] == ["word=a", "number=0.5"]


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_prints_only_what_differs_from_its_defaults(name: str) -> None:
    cls = load_pass(name)
    assert cls.name == name
    press = parse("knorm{budget=99}").passes[0]
    known = {"r": 99, "budget": 99, "residual": 99, "only": ("*mlp*",), "press": press, "nodes": 4}
    known |= {"at": 2, "count": 1, "min": 2, "after": (2, 3), "file": "a", "neighbours": 4}
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.init}
    needed = [pair for pair in known.items() if fields.get(pair[0]) is dataclasses.MISSING]
    options = needed or [pair for pair in known.items() if pair[0] in fields][:1]
    assert options or not fields
    given = " ".join(f"{option}={format_value(value)}" for option, value in options)
    text = f"{name}{{{given}}}" if given else name
    step = parse(text).passes[0]
    assert step == cls(**dict(options))
    assert str(step) == text
    assert dataclasses.is_dataclass(cls) and vars(cls)["__dataclass_params__"].frozen


@pytest.mark.parametrize(
    "text",
    [
        "tome{r=16 schedule=decreasing}",
        "tome{r=16,schedule=decreasing}",
        "tome{ r = 16 , schedule = decreasing }",
        " tome {r=16\tschedule=decreasing} ",
        'tome{r=16 schedule="decreasing"}',
    ],
)
def test_spellings_of_one_pipeline_print_alike(text: str) -> None:
    assert str(parse(text)) == "tome{r=16 schedule=decreasing}"


def test_empty_text_is_the_empty_pipeline() -> None:
    assert parse("") == parse("  ") == Pipeline()
    assert str(Pipeline()) == ""


def test_passes_text_and_pipeline_are_interchangeable() -> None:
    pipeline = parse("tome{r=4},evit{keep=0.5}")
    assert as_pipeline(str(pipeline)) == as_pipeline(list(pipeline.passes)) == as_pipeline(pipeline)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tom{r=4}", "unknown pass 'tom', did you mean 'tome'?"),
        ("evitt", "did you mean 'evit'?"),
        ("kcentre{r=1}", "did you mean 'kcenter'?"),
        ("tome{shedule=constant}", "no option 'shedule', did you mean 'schedule'?"),
        ("evit{kepe=0.7}", "no option 'kepe', did you mean 'keep'?"),
        (
            "zzz",
            "known: drop_unread, fold_scales, adapter, drop_blocks, exit, skipdecode, split, adakv, chunk",
        ),
        ("tome{r=1 r=2}", "option 'r' is given twice"),
        ("tome{r=}", "column 8: expected a value, found '}'"),
        ("tome{r}", "column 7: expected '=', found '}'"),
        ("tome{r=16", "found the end"),
        ("tome{r=16}}", "column 11: expected ',' or the end, found '}'"),
        ("tome{r=16} evit", "column 12: expected ',' or the end, found 'e'"),
        ("tome{r=1},,evit", "column 11: expected a pass's name, found ','"),
        ("tome{r=[1,2}", "expected ',' or ']', found '}'"),
        ('tome{schedule="constant}', "expected a closing quote"),
        ("tome{r=1 r=2}", "column 10: option 'r' is given twice"),
        ("tome{r=1},tom{r=4}", "column 11: unknown pass 'tom'"),
        ("tome{r=1 shedule=constant}", "column 10: pass tome has no option 'shedule'"),
        ("tome{r=1},tome{r=word}", "column 11: tome: r=word is of the wrong type"),
        ("wrap{inner=stil}", "column 12: unknown pass 'stil', did you mean 'still'?"),
        ("wrap{inner=stil{word=a}}", "column 12: unknown pass 'stil', did you mean 'still'?"),
        ("wrap{inner=still{wrod=a}}", "column 18: pass still has no option 'wrod', did you mean 'word'?"),
        ("wrap{inner=still{word=a}", "column 25: expected an option's name or '}', found the end"),
        ("wrap{inner=tova{budget=many}}", "column 12: tova: budget=many is of the wrong type"),
        ("wrap{inner=still press=snapkv}", "column 24: snapkv needs a budget"),
        (
            "wrap{inner=still press=tome{r=1}}",
            "column 1: wrap: press=tome{r=1} is of the wrong type; it takes KVEviction",
        ),
        ("wrap{inner=1}", "wrap: inner=1 is of the wrong type; it takes Pass"),
        ("tome{r=tome{r=1}}", "column 1: tome: r=tome{r=1} is of the wrong type"),
        ("tome{r=2 schedule=constant{}}", "column 19: unknown pass 'constant'"),
        ("wrap", "column 1: pass wrap needs the option 'inner', which takes Pass"),
        ("exit", "pass exit needs the option 'after', which takes a list such as [3,6]"),
        ("exit{after=6}", "exit: after=6 is of the wrong type; it takes a list such as [3,6]"),
        ("snapkv{budget=8 pooling=mean}", "pooling=mean is of the wrong type; it takes avg or max"),
        ("wrap{inner=" * 10, "column 100: more than 8 lists and passes inside each other"),
        ("{r=16}", "expected a pass's name"),
        ("16", "expected a pass's name"),
    ],
)
def test_error_says_where_and_suggests_the_nearest_name(text: str, message: str) -> None:
    with pytest.raises(PipelineSyntaxError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    "options",
    [
        *(
            "r=-1",
            "r=word",
            "r=1.5",
            "r=true",
            "r=[1,word]",
            "keep=0",
            "keep=1.5",
            "keep=word",
            "keep=true",
        ),
        *(
            "target=2",
            "r=1 keep=0.5",
            "r=2 schedule=sometimes",
            "r=2 schedule=3",
            "keep=0.5 schedule=decreasing",
        ),
        *("r=2 layers=word", "r=2 layers=[0.5]", "r=2 layers=3", "r=2 prefix=-1", "r=2 prefix=word"),
    ],
)
def test_option_of_wrong_type_or_range_is_a_syntax_error(name: str, options: str) -> None:
    with pytest.raises(PipelineSyntaxError, match=name):
        parse(f"{name}{{{options}}}")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, home in PASSES.items()
        if not {"quantize", "cleanup", "sample", "speculate"} & set(home.split("."))
        and name not in ("kivi", "int8_kv")
    ],
)
def test_how_much_to_remove_must_be_said(name: str) -> None:
    with pytest.raises(PipelineSyntaxError, match=name):
        parse(name)


@pytest.mark.parametrize("text", ["pitome{r=2 margin=wide}", "evit{r=2 fuse=3}", "random{r=2 seed=0.5}"])
def test_own_options_of_a_pass_are_checked_too(text: str) -> None:
    with pytest.raises(PipelineSyntaxError, match="wrong type"):
        parse(text)


tokens = st.sampled_from(
    [
        *PASSES,
        "still",
        "wrap",
        "inner",
        "press",
        "more",
        "r",
        "keep",
        "layers",
        "schedule",
        "prefix",
        "=",
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        "\\",
        " ",
        "\n",
    ]
    + ["0", "1", "-1", "0.5", "1e999", ".", "true", "none", "constant", "decreasing", "é", "\0", "9" * 5000]
)


@given(st.text(max_size=40) | st.lists(tokens, max_size=20).map("".join))
@example("tome{r=" + "9" * 5000 + "}")
@example("tome{r=" + "[" * 100_000 + "}")
@example("wrap{inner=" * 10_000)
@example("wrap{more=[" * 10_000)
@example("tome{keep=1e999}")
@example("tome{r=٣}")
def test_any_text_parses_or_raises_pipeline_syntax_error(text: str) -> None:
    try:
        pipeline = parse(text)
    except PipelineSyntaxError as error:
        assert len(str(error)) < 1000 + 2 * len(text)
    else:
        assert parse(str(pipeline)) == pipeline
