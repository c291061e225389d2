"""Resolve a directive: open its models, expand its layers, and derive the edit of each layer.

Every command starts here. Only the parts of a model that the directive needs are read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_interleave.checkpoint.checkpoint import Checkpoint, is_checkpoint
from mergekit_interleave.checkpoint.models import Models, Source
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import layer_range
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, Stack, Step
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.directive.scale import ALL, COPIES, NONE
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    LayoutError,
    RefusedError,
    Warn,
    collected_warnings,
)
from mergekit_interleave.gguf.model import GgufModel
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Edit, Layer, Layout, expand
from mergekit_interleave.planning.edits import Edits, averaged, idle_filters

MODEL_VARIABLE = "MK_INTERLEAVE_MODEL"
PROJECT_FILE = "interleave.yml"


@dataclass(frozen=True)
class Expansion:
    """A directive with its model found and its layers expanded.

    Attributes:
        directive: The directive, with the model filled in.
        layout: The layers.
        sources: The opened models, without those that could not be opened and are not needed.
        modules: See `mergekit_yaml.to_document`.
        warnings: The warnings, one sentence each.
    """

    directive: Directive
    layout: Layout
    sources: Mapping[ModelRef, Source] = field(default_factory=dict)
    modules: Mapping[str, int | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> ModelRef:
        """The model that config, tokenizer and small files are taken from."""
        stated = self.directive.mergekit.get("base_model")
        return self.layout.models[0] if stated is None else parse_model(stated, "base_model")

    @property
    def checkpoints(self) -> Mapping[ModelRef, Checkpoint]:
        """The opened models that are directories or Hub repositories."""
        found = self.sources.items()
        return {ref: model for ref, model in found if isinstance(model, Checkpoint)}

    @property
    def is_gguf(self) -> bool:
        """Whether its models are GGUF files."""
        return any(isinstance(model, GgufModel) for model in self.sources.values())

    @property
    def first(self) -> Checkpoint | None:
        """The model of the first layer, or None if it could not be opened."""
        return self.checkpoints.get(self.layout.models[0])

    @property
    def recipe(self) -> str:
        """The mergekit YAML."""
        return mergekit_yaml.to_yaml(
            self.layout,
            self.directive.mergekit,
            modules=self.modules,
            architectures=self.architectures,
        )

    @property
    def architectures(self) -> Mapping[ModelRef, str]:
        """The class names in the configs of its models, without those that are unknown."""
        named = {ref: model.config.get("architectures") for ref, model in self.checkpoints.items()}
        return {ref: str(classes[0]) for ref, classes in named.items() if classes}


def models_for(directive: Directive, models: Models) -> Models:
    """Return the models, without network access if the directive states the depth.

    Args:
        directive: The directive.
        models: Opens models.
    """
    return models if directive.layers is None else models.offline()


def resolve(
    directive: Directive,
    models: Models,
    *,
    strict: bool = False,
    allow_non_identity: bool = False,
) -> Expansion:
    """Open the models of a directive and expand its layers.

    Args:
        directive: The directive.
        models: Opens the models.
        strict: Refuse a model that cannot be read or whose type is unknown. Otherwise the
            directive is not checked against it, and Llama's tensor names are assumed.
        allow_non_identity: Accept a `zero` list that does not zero all residual writers.

    Raises:
        DirectiveError: The directive has no growth line, or no model can be found.
        CheckpointError: The depth is needed and the model cannot be read.
        LayoutError: The directive does not fit the model.
    """
    with collected_warnings() as warnings:
        directive = _completed(directive)
        warnings.extend(directive.warnings)
        mergekit_yaml.check_keys_of_mergekit(directive.mergekit)
        opener = _Opener(directive, models_for(directive, models), warnings.append, strict=strict)
        if isinstance(directive.growth, ExplicitSlices):
            directive, layout = _explicit(directive, directive.growth, opener)
        else:
            layout = _grown(directive, opener, allow_non_identity=allow_non_identity)
        expansion = Expansion(directive, layout, opener.opened)
        if strict:
            opener.open(expansion.base)
        first = expansion.first
        modules = first.modules if first else {}
        unique = tuple(dict.fromkeys(warnings))
    return dataclasses.replace(expansion, modules=modules, warnings=unique)


class _Opener:
    """Opens each model of a directive once.

    Attributes:
        opened: The models that could be opened.
    """

    def __init__(self, directive: Directive, models: Models, warn: Warn, *, strict: bool) -> None:
        self._directive, self._models = directive, models
        self.warn, self.strict = warn, strict
        self.opened: dict[ModelRef, Source] = {}
        self._depths: dict[ModelRef, int | None] = {}

    def depth_for_growth(self, model: ModelRef) -> int | None:
        """Open a model of a growth line and return its depth, or None if unknown and not needed."""
        needed, stated = _needs_depth(self._directive, model), self._directive.layers

        def failed(error: CheckpointError) -> None:
            if needed and stated is None:
                remedy = "without the model, use `gen --layers N`"
                if remedy not in (error.hint or ""):
                    error.hint = f"{error.hint}; {remedy}" if error.hint else remedy
                raise error
            result = "stated depth is not checked" if stated else "ranges are not checked"
            self.warn(f"{error}; the {result}")

        self.open(model, failed)
        return self._depth(model, needed=needed)

    def depth_for_slices(self, model: ModelRef) -> int | None:
        """Open a model of a mergekit config and return its depth; None if unknown."""

        def failed(error: CheckpointError) -> None:
            self.warn(f"{error}; the ranges are not checked")

        if model not in self._depths:
            self._depths[model] = self._directive.layers
            self.open(model, failed)
            try:
                self._depths[model] = self._depth(model, needed=True)
            except CheckpointError as error:
                if self.strict:
                    raise
                failed(error)
        return self._depths[model]

    def open(
        self, model: ModelRef, failed: Callable[[CheckpointError], object] | None = None
    ) -> None:
        """Open a model.

        Args:
            model: The model.
            failed: Called with the error if the model cannot be opened and `strict` is off.

        Raises:
            CheckpointError: The model cannot be opened and `strict` is on.
        """
        if self.strict:
            self.opened[model] = self._models.open_source(model)
            self.opened[model].require_family()
            self._models.check_lora(model)
            return
        checkpoint = self._models.open_source_if_possible(model, failed)
        if checkpoint is not None:
            self.opened[model] = checkpoint

    def _depth(self, model: ModelRef, *, needed: bool) -> int | None:
        """Return the number of layers of a model; None if it is unknown and not needed.

        Raises:
            CheckpointError: The number is needed, but the config does not state it.
            LayoutError: The directive states another number.
        """
        stated, checkpoint = self._directive.layers, self.opened.get(model)
        if checkpoint is None:
            return stated
        try:
            depth = checkpoint.depth
        except CheckpointError:
            if self.strict or (needed and stated is None):
                raise
            return stated
        if stated not in (None, depth):
            raise LayoutError(
                f"layers: {stated} is stated, but {model} has {depth} layers",
                hint="leave `layers` out; the depth is read from the model",
            )
        return depth


def _grown(directive: Directive, opener: _Opener, *, allow_non_identity: bool) -> Layout:
    """Return the layers of a growth line, with their edits."""
    if directive.growth is None:
        raise TypeError("a growth line is required")
    depths = {model: opener.depth_for_growth(model) for model in _sources(directive)}
    edits = Edits(opener.opened, opener.warn)
    rule, scale = directive.zero_rule, directive.scale or ()
    edited: list[int] = []
    damping = directive.growth.damping
    edits_layers = rule != NONE or scale or damping > 1 or directive.from_ is not None
    if directive.growth.warning is not None:
        opener.warn(directive.growth.warning)

    def edit(layer: Layer) -> Edit:
        edited.append(layer.index)
        if damping > 1:
            return edits.damped(layer, damping)
        found = edits.of(layer, rule, scale)
        if directive.from_ is None:
            return found
        return averaged(found, layer, depths[layer.model], opener.warn)

    layout = expand(
        directive.growth,
        directive.model,
        depths.__getitem__,
        edit if edits_layers else None,
        apply_to=ALL if damping > 1 else directive.apply_to or COPIES,
        step_edit=lambda step, layer: edits.of(layer, step.zero or NONE, step.scale),
    )
    has_edits = directive.scale or directive.zero not in (None, NONE)
    if has_edits and not edited:
        raise LayoutError(
            "zero, scale: there is no new layer to apply them to",
            hint="set `zero` and `scale` in a step of `layout:`",
        )
    try:
        edits.check(layout, directive, allow_non_identity=allow_non_identity)
        for warning in idle_filters(layout, opener.opened, edits.zeroed):
            opener.warn(warning)
    except CheckpointError as error:
        if opener.strict:
            raise
        opener.warn(f"{error}; the names in `zero` are not checked")
    return layout


def _sources(directive: Directive) -> tuple[ModelRef, ...]:
    """Return the models that a directive takes layers from."""
    default = (directive.model,) if directive.needs_model and directive.model is not None else ()
    named = directive.growth.models if isinstance(directive.growth, Stack) else ()
    return tuple(dict.fromkeys((*default, *named)))


def _completed(directive: Directive) -> Directive:
    """Complete a directive: find its model, and read interleave.yml if it has no growth line."""
    if directive.growth is None and os.path.isfile(PROJECT_FILE):
        directive = directives.load_file(Path(PROJECT_FILE)).replaced_by(directive)
    if isinstance(directive.growth, ExplicitSlices):
        for name in ("zero", "scale", "apply_to"):
            if getattr(directive, name) is not None:
                raise DirectiveError(
                    f"{name}: cannot be combined with a mergekit config, which already sets scales "
                    "per layer",
                    hint=f"leave --{name.replace('_', '-')} out and change the scales there",
                )
        return directive
    if directive.growth is None:
        raise DirectiveError(
            "nothing to do: no growth line",
            hint="add one, for example `--every 4`, `--repeat 8:24` or `interleave: every 4`",
        )
    directive.check()
    if not directive.needs_model:
        if directive.model is not None:
            raise DirectiveError(
                "model: each step of the layout already names a model",
                hint="leave --model (`model:`) out",
            )
        return directive
    return directive if directive.model is not None else _implicit_model().replaced_by(directive)


def _implicit_model() -> Directive:
    """Return a directive that names the model, from the environment, the directory or a file.

    If interleave.yml names the model, all its keys apply, except its growth line.
    """
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
        "no model: the directive does not name one",
        hint=f"add `model:`, pass --model, set {MODEL_VARIABLE}, run in a model directory, or "
        f"name the model in {PROJECT_FILE}",
    )


def _needs_depth(directive: Directive, model: ModelRef) -> bool:
    if isinstance(directive.growth, Stack):
        parts = directive.growth.parts
        own = Stack((Step(tuple(p for p in parts if (p.model or directive.model) == model)),))
        return own.needs_depth
    return directive.growth is not None and directive.growth.needs_depth


def _explicit(
    directive: Directive, growth: ExplicitSlices, opener: _Opener
) -> tuple[Directive, Layout]:
    """Return the layers of a mergekit config; --model replaces its only model everywhere."""
    layout = mergekit_yaml.from_document(growth.document, opener.depth_for_slices)
    if directive.model is not None:
        if len(layout.models) > 1:
            raise DirectiveError(
                "model: cannot replace the models of a mergekit config that names several"
            )
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
    depths = {model: opener.depth_for_slices(model) for model in layout.models}
    _check_modules(growth.document, opener.opened.get(layout.models[0]))
    for part in layout.slices:
        depth = depths[part.model]
        if depth is not None:
            layer_range.resolve((part.start, part.stop), depth, part.model)
    for warning in idle_filters(layout, opener.opened):
        opener.warn(warning)
    return directive, layout


def _check_modules(document: Mapping[str, object], checkpoint: Source | None) -> None:
    """Check that the other modules, which are passed on unchanged, are complete."""
    known = checkpoint.modules if checkpoint else {}
    for name, count in mergekit_yaml.other_modules(document).items():
        if known and known.get(name) != count:
            raise RefusedError(
                f"modules.{name}: [0, {count}] is not the whole module, but only "
                f"{mergekit_yaml.GROWN} can be changed"
            )
