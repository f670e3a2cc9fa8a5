"""Early exit: a model in stages, after each of which the rows leave whose answer is good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from tokopt.analysis.blocks import blocks_of
from tokopt.analysis.guarantee import Promise
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.format import Entry, Link, Port
from tokopt.ir.program import Program
from tokopt.passes.exit.calibrate import (
    Answers,
    Choice,
    Parts,
    Records,
    choose,
    collect,
    divide,
    least,
    least_to_fit,
    left_at,
    scores,
    total_loss,
)
from tokopt.passes.exit.files import read_heads, read_labels
from tokopt.passes.exit.heads import Affine, fit_logistic, fit_ridge, fit_temperature
from tokopt.passes.exit.rules import load_rule
from tokopt.passes.exit.rules.base import Rule
from tokopt.passes.exit.stages import Decide, Stages, cut_stages
from tokopt.passes.exit.tail import Tail
from tokopt.passes.reduce.base import before_reductions, reduces_tokens
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal

FEWEST = 2
"""Rows to fit to, and to choose by, at least; a promise takes many more."""

_MODEL = "the model"


@dataclass(frozen=True)
class Exit(Pass):
    """Let rows leave after some blocks, those of which an exit's answer is good enough.

    The model is cut into stages ``after`` so many blocks each, programs that share its weights. Every early stage ends
    in the model's own end (final norm, pooling, last layer), whose last linear layer is refitted on the frozen model;
    where there is none an affine map follows. It gives the model's outputs and says which rows are done. The runtime
    packs the others and goes on, so that no row waits for another.

    ``rule``: ``entropy`` (DeeBERT, arXiv 2004.12993), ``margin`` (CALM, arXiv 2207.07061), ``uncertainty`` (BERxiT,
    EACL 2021), ``patience`` (PABEE, arXiv 2006.04152), or ``convergence`` of features, for models without classes.
    ``output`` names the output that it reads, by default the first [batch, n].

    The ``threshold`` is chosen so that rows disagree with the full model in at most ``tolerance`` of all cases, with
    ``confidence``: learn then test (arXiv 2110.01052) on calibration inputs that fitted nothing else. Of models without
    classes it is the mean cosine distance that is at most ``tolerance``. A threshold that is given promises nothing.

    ``fit``: ``ridge`` regression to the model's own output, ``logistic`` regression to its classes' probabilities (or
    to ``labels``, a safetensors file with a tensor of that name), or the model's ``own`` last layer as it is. ``heads``
    is a safetensors file of heads instead: ``3.weight``, ``3.bias`` and perhaps ``3.temperature`` for the exit after
    block 3.

    Rules. Encoders of one program, whose batch is of variable size. Where tokens were merged or pruned before, exits
    are put into the model with all its tokens and reduced with it; that takes the pipeline that reduced them, and a
    fixed number of tokens.
    """

    after: tuple[int, ...]
    rule: Literal["entropy", "margin", "uncertainty", "patience", "convergence"] = "entropy"
    tolerance: float = 0.01
    confidence: float = 0.95
    threshold: float | None = None
    fit: Literal["ridge", "logistic", "own"] = "ridge"
    heads: str = ""
    labels: str = ""
    output: str = ""

    name: ClassVar[str] = "exit"
    semantics: ClassVar[Semantics] = "approximate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.after or list(self.after) != sorted(set(self.after)) or self.after[0] < 1:
            raise PassError(
                f"{self.name}: after={list(self.after)} must be numbers of blocks that grow, as in after=[3,6,9]"
            )
        for option in ("tolerance", "confidence"):
            if not 0 < getattr(self, option) < 1:
                raise PassError(f"{self.name}: {option}={getattr(self, option)} must be between 0 and 1")
        if self.labels and (self.fit != "logistic" or self.heads):
            raise PassError(f"{self.name}: labels are for fit=logistic without heads; leave them out")
        if self.fit == "logistic" and not load_rule(self.rule).classes:
            raise PassError(f"{self.name}: fit=logistic is for rules about classes, and {self.rule} is not")

    @property
    def _fits(self) -> bool:
        """Whether anything is fitted to calibration inputs."""
        return (self.fit != "own" and not self.heads) or self.rule == "uncertainty"

    def requires(self, bundle: Bundle) -> None:
        """An encoder of one program without states."""
        if bundle.schedule.generates:
            raise PassError(
                f"{self.name} is for encoders; in a language model skipdecode lets tokens skip blocks, and drop_blocks "
                "removes blocks"
            )
        if bundle.exits:
            raise PassError(f"{self.name}: rows leave the model early already; use the pass once")
        if len(bundle.schedule.entries) > 1 or bundle.states:
            raise PassError(
                f"{self.name}: the model has several programs or states; give a model of one program"
            )

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Cut the model, fit the heads, choose the threshold."""
        try:
            stages = _stages(bundle, self.after, context)
            decides = self._deciding(stages.tail)
            fitted = self._fitted(bundle, stages, decides, context)
            if isinstance(fitted, Refusal):
                return PassResult(bundle, 0, (), (fitted,))
            made = _staged(bundle, stages, fitted, decides)
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(_MODEL, str(reason)),))
        return PassResult(made, len(self.after), fitted.notes)

    def _deciding(self, tail: Tail) -> int:
        """The number of the head whose output the rule reads."""
        found = [
            i
            for i, one in enumerate(tail.fitted)
            if len(tail.outputs[one.place].axes) == 2 and self.output in ("", tail.outputs[one.place].name)
        ]
        rule = load_rule(self.rule)
        if not found or (rule.classes and cast(int, tail.outputs[tail.fitted[found[0]].place].axes[1]) < 2):
            known = ", ".join(spec.name for spec in tail.outputs)
            what = "logits" if rule.classes else "features"
            reason = f"the rule {self.rule} reads {what} [batch, n], and none of the outputs {known}"
            reason += f" is {self.output!r} of that form" if self.output else " has that form"
            if any(len(spec.axes) > 2 and self.output in ("", spec.name) for spec in tail.outputs):
                reason += (
                    "; of outputs per token no row leaves, since it leaves as a whole: let the model give an output "
                    "for every row too, such as the mean over its tokens"
                )
            raise PassRefused(reason)
        return found[0]

    # --- fitting --------------------------------------------------------------------------------------------

    def _fitted(self, bundle: Bundle, stages: Stages, decides: int, context: Context) -> _Fit | Refusal:
        """Heads, temperatures and the threshold."""
        tail, rule = stages.tail, load_rule(self.rule)
        own = [[one.own for one in tail.fitted] for _ in self.after]
        heads, temperatures = own, [1.0] * len(self.after)
        loaded = read_heads(self.heads, self.after, own[0][decides]) if self.heads else None
        if loaded is not None:
            for row, head in zip(heads, loaded.heads, strict=True):
                row[decides] = head
            temperatures = loaded.temperatures
        if self.threshold is not None and not self._fits:
            return _Fit(rule, heads, temperatures, [], float(self.threshold), (self._unpromised,))
        records = collect(bundle, *stages.probes(), tail, context.samples(self.name))
        parts = self._parts(records.count)
        notes: list[str] = []
        if self.fit != "own" and loaded is None:
            classes = records.targets[decides].shape[-1]
            labels = read_labels(self.labels, records.count, classes) if self.labels else None
            heads = self._heads(records, parts, tail, decides, labels)
            notes.append(f"heads fitted ({self.fit}) to {len(parts.fitted)} of {records.count} inputs")
        answers = Answers.of(records, heads, decides)
        if rule.classes and len(parts.held) and loaded is None:
            classes = answers.final.argmax(-1)[parts.held]
            temperatures = [fit_temperature(one[parts.held], classes) for one in answers.outputs]
            shown = ", ".join(f"{t:.2g}" for t in temperatures)
            notes.append(f"temperatures {shown} by {len(parts.held)} others")
        fit = _Fit(rule, heads, temperatures, [], 0.0, tuple(notes))
        return self._with_threshold(rule, answers, parts, fit, tail.outputs[tail.fitted[decides].place].name)

    def _parts(self, count: int) -> Parts:
        """The rows by what they are for; raises PassError where they are too few for the promise."""
        promises = self.threshold is None
        parts = divide(count, fits=self._fits, promises=promises)
        if promises:
            needed = Promise(self.tolerance, self.confidence).needed
            total = least(needed, fits=self._fits)
            if len(parts.promised) < needed:
                raise PassError(
                    f"{self.name}: a tolerance of {self.tolerance:g} with confidence {self.confidence:g} takes "
                    f"{needed} inputs without an error that fitted nothing, so {total} calibration inputs, and there "
                    f"are {count}; give more, allow more, or set threshold, which promises nothing"
                )
        if self._fits and not parts.fit_at_least(FEWEST):
            raise PassError(
                f"{self.name}: {count} calibration inputs are too few to fit heads to; give at least "
                f"{least_to_fit(FEWEST, promises=promises)}"
            )
        return parts

    def _heads(
        self, records: Records, parts: Parts, tail: Tail, decides: int, labels: Tensor | None
    ) -> list[list[Affine]]:
        """The head of every exit and output."""
        made: list[list[Affine]] = []
        for e in range(len(self.after)):
            made.append([])
            for h, one in enumerate(tail.fitted):
                rows, held = records.rows(e, h, parts.fitted), records.rows(e, h, parts.held)
                head = fit_ridge(rows, held, one.own)
                if self.fit == "logistic" and h == decides:
                    wanted = records.targets[h].softmax(-1)
                    if labels is not None:
                        wanted = torch.nn.functional.one_hot(labels, wanted.shape[1]).float()
                    head = fit_logistic(
                        replace(rows, targets=wanted[parts.fitted]),
                        replace(held, targets=wanted[parts.held]),
                        head,
                    )
                made[-1].append(head)
        return made

    def _with_threshold(
        self, rule: Rule, answers: Answers, parts: Parts, fit: _Fit, output: str
    ) -> _Fit | Refusal:
        """The threshold that is given, or the one that keeps the promise; ``output`` is what the rule reads."""
        seen, losses = answers.seen(fit.temperatures), answers.losses(rule)
        held = [
            replace(one, output=one.output[parts.held], features=one.features[parts.held]) for one in seen
        ]
        own = rule.fit(held, list(losses[:, parts.held]))
        known = scores(rule, seen, own)
        if self.threshold is not None:
            left = left_at(rule, known[:, parts.held], self.threshold)
            choice = Choice(float(self.threshold), left, total_loss(losses[:, parts.held], left))
            return replace(
                fit,
                own=own,
                threshold=choice.threshold,
                notes=(*fit.notes, self._left(choice, len(parts.held), output), self._unpromised),
            )
        promise = Promise(self.tolerance, self.confidence)
        candidates = rule.thresholds(known[:, parts.held])
        choice = choose(rule, candidates, known[:, parts.promised], losses[:, parts.promised], promise)
        count = len(parts.promised)
        if choice is None or not bool((choice.left < len(self.after)).any()):
            return Refusal(
                _MODEL,
                f"no threshold of {self.rule} lets a row leave early and keeps a tolerance of {self.tolerance:g} with "
                f"confidence {self.confidence:g} on {count} inputs",
            )
        sure = f"so with confidence {self.confidence:g}"
        if rule.classes:
            bound = (
                f"of {count} inputs that fitted nothing {choice.loss:g} disagree with the full model; {sure} at most "
                f"{100 * self.tolerance:g} % of such inputs do"
            )
        else:
            bound = (
                f"on {count} inputs that fitted nothing the mean cosine distance from the full model is "
                f"{choice.loss / count:.2g}; {sure} it is at most {self.tolerance:g} on such inputs"
            )
        notes = (*fit.notes, self._left(choice, count, output), bound)
        return replace(fit, own=own, threshold=choice.threshold, notes=notes)

    @property
    def _unpromised(self) -> str:
        """What a threshold that is given means."""
        return f"the threshold {self.threshold:g} of {self.rule} was given, and promises nothing"

    def _left(self, choice: Choice, count: int, output: str) -> str:
        """Where rows left, by which output."""
        places = [int((choice.left == e).sum()) for e in range(len(self.after) + 1)]
        early = ", ".join(
            f"{n} after {depth} block{'s' * (depth != 1)}"
            for n, depth in zip(places, self.after, strict=False)
        )
        return (
            f"threshold {choice.threshold:.4g} of {self.rule} on {output}: of {count} inputs {early}, {places[-1]} at "
            "the end"
        )


@dataclass(frozen=True)
class _Fit:
    """All that exits have beside the model: heads of every exit and output, temperatures, the rule's parameters."""

    rule: Rule
    heads: Sequence[Sequence[Affine]]
    temperatures: Sequence[float]
    own: Sequence[Tensor]
    threshold: float
    notes: tuple[str, ...]


_REDUCED_BEFORE = (
    "its tokens were reduced before it was calibrated or saved; give the reduction and exit in one pipeline, with no "
    "pass that calibrates between them"
)


def _stages(bundle: Bundle, after: Sequence[int], context: Context) -> Stages:
    """Where the model may be cut, with the tokens that were removed of it removed in the stages; raises PassRefused."""
    program, name = bundle.main, bundle.main_name
    done = program.reductions
    if done is None and reduces_tokens(program.module.graph):
        raise PassRefused(_REDUCED_BEFORE)
    if done is None or not done.methods:
        return cut_stages(program, after)
    base = before_reductions(bundle, name, context)

    def reduce(wide: Program) -> Program:
        for method in base.methods:
            assert isinstance(method, Pass)
            wide = method.run(bundle.with_program(name, wide), context).bundle.programs[name]
        if _tokens(wide) != _tokens(program):
            raise PassRefused(
                "with exits in between its tokens cannot be reduced as they were; put the pass that reduces them after "
                "exit, where it works within each stage"
            )
        return wide

    return cut_stages(base.base, after, reduce)


def _tokens(program: Program) -> list[int]:
    """The tokens in every block, under the example inputs."""
    return [block.site.tokens for block in blocks_of(program.module.graph)]


def _staged(bundle: Bundle, stages: Stages, fit: _Fit, decides: int) -> Bundle:
    """The bundle of stages with exits."""
    rules = [Decide(fit.rule, fit.threshold, temperature) for temperature in fit.temperatures]
    made, links = stages.with_exits(rules, fit.heads, fit.own, decides)
    name = bundle.main_name
    taken = [other for other in bundle.programs if other != name]
    names: list[str] = []
    for depth in stages.depths:
        names.append(fresh(f"{name}_{depth}", [*taken, *names]))
    known = dict(zip(made, names, strict=True))

    def renamed(port: Port) -> Port:
        return Port(known[port.program], port.name)

    programs: Mapping[str, Program] = {
        **{other: bundle.programs[other] for other in taken},
        **{known[stage]: program for stage, program in made.items()},
    }
    entries = tuple(
        Entry(made_name, "encode", depth=depth) for made_name, depth in zip(names, stages.depths, strict=True)
    )
    return replace(
        bundle,
        programs=programs,
        links=tuple(Link(renamed(link.source), renamed(link.target), link.when) for link in links),
        schedule=replace(bundle.schedule, entries=entries),
    )
