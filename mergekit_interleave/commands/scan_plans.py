"""Plan the layouts that a scan measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_interleave._files import read_text
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.commands.load import planned
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.errors import DirectiveError, InterleaveError, Warn
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import resolve
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.scanning import spaces
from mergekit_interleave.scanning.spaces import Candidate

Outcomes: TypeAlias = "Mapping[Candidate, ExpansionPlan | InterleaveError]"
"""The plan of each layout, or why `run` refuses it."""


@dataclass(frozen=True)
class Planner:
    """Plans layouts, each once. Another process plans those that it needs again.

    Attributes:
        model: The model, if the directives name none.
        trusted: Whether code from the model may run.
        scratch: The directory in which a GGUF file is converted for transformers; None refuses it.
    """

    model: ModelLike | None
    trusted: bool
    scratch: Path | None = None
    _made: dict[str, ExpansionPlan] = field(default_factory=dict, compare=False, repr=False)
    _specs: dict[TensorSpec, TensorSpec] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _models(self) -> Models:
        """Opens each source model once for all layouts."""
        return Models(trust_remote_code=self.trusted, dequantize_into=self.scratch)

    def base(self) -> Checkpoint:
        """Open the model that layouts start from, without a plan, since `run` may refuse some.

        Raises:
            InterleaveError: There is none, or it cannot be grown.
        """
        some = inputs.parse(inputs.Text("append: 1", "--model"), {"model": self.model})
        expansion = resolve(some, self._models, strict=True, allow_non_identity=True)
        return self._models.open(expansion.base)

    def __reduce__(self) -> tuple[Any, ...]:
        return Planner, (self.model, self.trusted, self.scratch)

    def of(self, directive: str) -> ExpansionPlan:
        """Return the plan of a layout; see `plan`."""
        return self.plan(inputs.Text(directive, directive), lambda _: None)

    def plan(self, text: inputs.Text, warn: Warn) -> ExpansionPlan:
        """Plan a layout.

        Raises:
            InterleaveError: It is refused.
        """
        if text.text in self._made:
            return self._made[text.text]
        wanted = _parsed(text, self.model)
        try:
            found = planned(wanted, self._models, warn=warn)
        except InterleaveError as error:
            if text.where != text.text:  # a line of a file
                error.args = (f"{text.where}: {error}",)
            raise
        # Equal specs are shared: 3,240 layouts of 80 layers have millions of them.
        specs = tuple(self._specs.setdefault(spec, spec) for spec in found.specs)
        return self._made.setdefault(text.text, replace(found, specs=specs))

    def outcomes(self, candidates: Iterable[Candidate]) -> Outcomes:
        """Plan each layout, or find out why `run` refuses it."""

        def outcome(each: Candidate) -> ExpansionPlan | InterleaveError:
            try:
                return self.of(each.directive)
            except InterleaveError as error:
                return error

        return {each: outcome(each) for each in candidates}


def accepted(outcomes: Outcomes) -> dict[Candidate, ExpansionPlan]:
    """Return the plans of the layouts that `run` writes.

    Raises:
        InterleaveError: It refuses all of them.
    """
    found = {each: one for each, one in outcomes.items() if isinstance(one, ExpansionPlan)}
    for one in outcomes.values():
        if not found and isinstance(one, InterleaveError):
            raise one
    return found


def _parsed(text: inputs.Text, model: ModelLike | None) -> Directive:
    """Parse a directive; a model is given to it unless it stacks layers of models that it names.

    Raises:
        DirectiveError: It cannot be parsed, or names another model.
    """
    found = inputs.parse(text, {})
    if model is None or (found.growth and found.growth.models):
        return found
    given = inputs.parse(text, {"model": model})
    if found.model and given.model and found.model.identity != given.model.identity:
        raise DirectiveError(
            f"{text.where}: names the model {found.model}, and --model is {given.model}",
            hint="leave --model out",
        )
    return given


@dataclass(frozen=True)
class Work:
    """The layouts to measure.

    Attributes:
        candidates: The layouts.
        planner: Plans them, or has done so.
    """

    candidates: tuple[Candidate, ...]
    planner: Planner

    @property
    def plans(self) -> dict[str, ExpansionPlan]:
        """The plan of each layout, by its directive."""
        return {each.directive: self.planner.of(each.directive) for each in self.candidates}

    @property
    def first(self) -> Checkpoint:
        """The model that all of them start from."""
        return self.planner.of(self.candidates[0].directive).first


def prepared(
    file: StrPath | None, planner: Planner, space: str | Sequence[str], warn: Warn
) -> Work:
    """Plan the layouts to measure.

    Raises:
        InterleaveError: There are none, or a layout of a file is refused.
    """
    names = [space] if isinstance(space, str) else list(space)
    if file is not None and names:
        raise DirectiveError(
            "a file of layouts cannot be combined with --space", hint="leave one of them out"
        )
    if file is not None:
        listed = _listed(Path(file))
        texts = [inputs.Text(each.directive, where) for each, where in listed]
        _check_same_model([planner.plan(text, warn) for text in texts])
        return Work(tuple(each for each, _ in listed), planner)
    depth = planner.base().depth
    outcomes = planner.outcomes(spaces.candidates(names or [spaces.BLOCKS], depth))
    found = accepted(outcomes)
    refused = [each for each in outcomes.values() if isinstance(each, InterleaveError)]
    if refused:
        warn(f"{len(refused)} of {len(outcomes)} layouts are left out, because `run` refuses them; "
             f"for example: {refused[0]}")  # fmt: skip
    return Work((*found,), planner)


def _listed(file: Path) -> list[tuple[Candidate, str]]:
    """Return the layouts of a file, one directive per line, each with its place.

    Raises:
        DirectiveError: It cannot be read, or has none.
    """
    found = [
        (Candidate(line.text.strip(), spaces.FILE), line.where)
        for line in inputs.lines(read_text(file), str(file))
    ]
    if not found:
        raise DirectiveError(
            f"{file}: has no directives", hint="write one a line, such as `repeat: 8:14`"
        )
    return found


def _check_same_model(plans: Sequence[ExpansionPlan]) -> None:
    first = plans[0].first.ref
    for plan in plans:
        if plan.first.ref.identity != first.identity:
            raise DirectiveError(
                f"the layouts start from different models: {first} and {plan.first.ref}",
                hint="scan each model alone",
            )


def with_model(directive: str, model: ModelLike | None) -> str:
    """Return a directive as a file for `run`, with its model if that is known."""
    place = Path(str(model)).absolute() if model and Path(str(model)).is_dir() else model
    found = _parsed(inputs.Text(directive, directive), place)
    return yaml_io.write(found.to_document())
