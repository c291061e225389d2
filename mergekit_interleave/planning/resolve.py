"""From a directive to a layout: finds the model and its depth, and settles what is zeroed.

Every command starts here. What must be known of the model is asked for only where the directive
needs it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_interleave.checkpoint.checkpoint import (
    Checkpoint,
    config_errors,
    is_checkpoint,
)
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import layer_range
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, Stack, Step
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.directive.scale import COPIES, NONE
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    LayoutError,
    RefusedError,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Edit, Layer, Layout, expand
from mergekit_interleave.planning.edits import Edits, warn_of_idle_filters

log = logging.getLogger(__name__)

MODEL_VARIABLE = "MK_INTERLEAVE_MODEL"
PROJECT_FILE = "interleave.yml"


@dataclass(frozen=True)
class Expansion:
    """A directive with its model found and its layers laid out.

    Attributes:
        directive: What the user asked for, the model filled in.
        layout: What that means.
        modules: See `recipe.to_document`.
    """

    directive: Directive
    layout: Layout
    modules: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def base(self) -> ModelRef:
        """The model that gives config, tokenizer and small files."""
        stated = self.directive.mergekit.get("base_model")
        return self.layout.models[0] if stated is None else parse_model(stated, "base_model")

    @property
    def recipe(self) -> str:
        """The mergekit YAML."""
        return mergekit_yaml.to_yaml(self.layout, self.directive.mergekit, modules=self.modules)


def resolve(
    directive: Directive,
    models: Models,
    *,
    strict: bool = False,
    allow_non_identity: bool = False,
) -> Expansion:
    """Lay out what a directive asks for.

    Args:
        directive: The user's words.
        models: Where models are opened.
        strict: Refuse a model that cannot be read or whose type is not known, rather than take
            the user's word or Llama's names for it.
        allow_non_identity: Let a list of names to zero leave a residual writer standing.

    Raises:
        DirectiveError: The directive says nothing to do, or no model can be found.
        CheckpointError: The depth is needed and the model cannot be read.
        LayoutError: The directive does not fit the model.
    """
    directive = _completed(directive)
    for warning in directive.warnings:
        log.warning("%s", warning)
    mergekit_yaml.check_keys_of_mergekit(directive.mergekit)
    models.cached_only = directive.layers is not None
    place = Path() if directive.model is None else models.place(directive.model)
    with config_errors(place):
        return _resolve(directive, models, strict=strict, allow_non_identity=allow_non_identity)


def _resolve(
    directive: Directive, models: Models, *, strict: bool, allow_non_identity: bool
) -> Expansion:
    if isinstance(directive.growth, ExplicitSlices):
        directive, layout = _spelled(directive, directive.growth, models, strict=strict)
        first = _opened(layout.models[0], models)
        return Expansion(directive, layout, first.modules if first else {})
    if directive.growth is None:
        raise TypeError("_completed fills it in")
    opened: dict[ModelRef, Checkpoint | None] = {}
    depths: dict[ModelRef, int | None] = {}
    for model in _sources(directive):
        opened[model] = _try_open(model, models, directive, strict=strict)
        depths[model] = _depth(directive, opened[model], strict=strict)
    edits = Edits(opened)
    rule, scale = directive.zero_rule, directive.scale or ()
    edited: list[int] = []

    def edit(layer: Layer) -> Edit:
        edited.append(layer.index)
        return edits.of(layer, rule, scale)

    layout = expand(
        directive.growth,
        directive.model,
        depths.__getitem__,
        None if rule == NONE and not scale else edit,
        apply_to=directive.apply_to or COPIES,
        step_edit=lambda step, layer: edits.of(layer, step.zero or NONE, step.scale),
    )
    asked = directive.scale or directive.zero not in (None, NONE)
    if asked and not edited:
        raise LayoutError(
            "zero, scale: there is no new layer to which they would apply",
            hint="a step of `layout:` has its own `zero` and `scale`",
        )
    try:
        edits.check(layout, directive, allow_non_identity=allow_non_identity)
        warn_of_idle_filters(layout, opened, edits.zeroed)
    except CheckpointError as error:
        if strict:
            raise
        log.warning("%s; the names to zero are not checked", error)
    first = opened[layout.models[0]]
    return Expansion(directive, layout, first.modules if first else {})


def _sources(directive: Directive) -> tuple[ModelRef, ...]:
    """The models that a directive takes layers of."""
    own = (directive.model,) if directive.needs_model and directive.model is not None else ()
    named = directive.growth.models if isinstance(directive.growth, Stack) else ()
    return tuple(dict.fromkeys((*own, *named)))


def _completed(directive: Directive) -> Directive:
    """The directive with its model found, and with interleave.yml read where it is needed."""
    if directive.growth is None and os.path.isfile(PROJECT_FILE):
        directive = directives.load_file(Path(PROJECT_FILE)).replaced_by(directive)
    if isinstance(directive.growth, ExplicitSlices):
        for name in ("zero", "scale", "apply_to"):
            if getattr(directive, name) is not None:
                raise DirectiveError(
                    f"--{name.replace('_', '-')} has no place beside a mergekit config, which says "
                    "it for every layer"
                )
        return directive
    if directive.growth is None:
        raise DirectiveError(
            "nothing to do: no growth line",
            hint="for example `--every 4`, `--repeat 8:24`, or a directive 'interleave: every 4'",
        )
    directive.check()
    if not directive.needs_model:
        if directive.model is not None:
            raise DirectiveError(
                "model: the layout names a model for each of its steps", hint="leave it out"
            )
        return directive
    return directive if directive.model is not None else _implicit_model().replaced_by(directive)


def _implicit_model() -> Directive:
    """What names the model where the directive does not; interleave.yml with all that it says."""
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return Directive(model=parse_model(named, MODEL_VARIABLE))
    here = Path.cwd()
    if is_checkpoint(here):
        return Directive(model=ModelRef(ModelPath(str(here))))
    if os.path.isfile(PROJECT_FILE):
        project = directives.load_file(Path(PROJECT_FILE))
        if project.model is not None:
            return dataclasses.replace(project, growth=None)
    raise DirectiveError(
        "no model: the directive names none",
        hint=f"write `model:` in it, use --model, set {MODEL_VARIABLE}, start in a model's "
        f"directory, or name the model in {PROJECT_FILE} there",
    )


def _try_open(
    model: ModelRef, models: Models, directive: Directive, *, strict: bool
) -> Checkpoint | None:
    """The model, or None where it cannot be read and the directive can do without it."""
    if strict:
        checkpoint = models.open(model)
        checkpoint.require_family()
        return checkpoint
    try:
        return models.open(model)
    except CheckpointError as error:
        if directive.layers is None and _needs_depth(directive, model):
            way_out = "`gen --layers N` does without it"
            error.hint = f"{error.hint}; {way_out}" if error.hint else way_out
            raise
        how = "depth is taken as stated" if directive.layers else "ranges are not checked"
        log.warning("%s; its %s", error, how)
        return None


def _needs_depth(directive: Directive, model: ModelRef) -> bool:
    if isinstance(directive.growth, Stack):
        parts = directive.growth.parts
        own = Stack((Step(tuple(p for p in parts if (p.model or directive.model) == model)),))
        return own.needs_depth
    return directive.growth is not None and directive.growth.needs_depth


def _depth(directive: Directive, checkpoint: Checkpoint | None, *, strict: bool) -> int | None:
    if checkpoint is None:
        return directive.layers
    try:
        depth = checkpoint.depth
    except CheckpointError:
        needed = directive.layers is None and _needs_depth(directive, checkpoint.ref)
        if strict or needed:
            raise
        return directive.layers
    if directive.layers not in (None, depth):
        raise LayoutError(
            f"layers: {directive.layers} is stated, but the config of {checkpoint.ref} "
            f"says {depth}",
            hint="leave it out: the depth is read from config.json",
        )
    return depth


def _opened(model: ModelRef, models: Models) -> Checkpoint | None:
    try:
        return models.open(model)
    except CheckpointError:
        return None


def _spelled(
    directive: Directive, growth: ExplicitSlices, models: Models, *, strict: bool
) -> tuple[Directive, Layout]:
    """The layout of a mergekit config; --model takes the place of its only model everywhere."""

    def depth_of(model: ModelRef) -> int | None:
        try:
            return _depth(directive, models.open(model), strict=True)
        except CheckpointError as error:
            if strict:
                raise
            if model not in warned:
                warned.add(model)
                log.warning("%s; its ranges are not checked", error)
            return directive.layers

    warned: set[ModelRef] = set()
    layout = mergekit_yaml.from_document(growth.document, depth_of)
    if directive.model is not None:
        if len(layout.models) > 1:
            raise DirectiveError("--model: the mergekit config names several models")
        (old,), new = layout.models, directive.model
        slices = (dataclasses.replace(part, model=new) for part in layout.slices)
        layout = Layout(tuple(slices))
        written = mergekit_yaml.to_document(
            layout,
            directive.mergekit,
            lambda model: (new if model.identity == old.identity else model).to_yaml(),
        )
        keys = {key: written[key] for key in directive.mergekit}
        directive = dataclasses.replace(directive, mergekit=keys)
    _check_modules(growth.document, layout.models[0], models)
    depths = {model: depth_of(model) for model in layout.models}
    for part in layout.slices:
        depth = depths[part.model]
        if depth is not None:
            layer_range.resolve((part.start, part.stop), depth, part.model)
    warn_of_idle_filters(layout, {model: _opened(model, models) for model in layout.models})
    return directive, layout


def _check_modules(document: Mapping[str, object], model: ModelRef, models: Models) -> None:
    """Modules beside the one that is grown must be passed on whole: they are, whatever is said."""
    checkpoint = _opened(model, models)
    known = checkpoint.modules if checkpoint else {}
    for name, count in mergekit_yaml.other_modules(document).items():
        if known and known.get(name) != count:
            raise RefusedError(
                f"modules.{name}: [0, {count}] is not all of it; only {mergekit_yaml.GROWN} can "
                "be changed"
            )
