"""From a directive to a layout: finds the model and its depth, and settles what is zeroed.

Every command starts here. What must be known of the model is asked for only where the directive
needs it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_interleave import directive as directives
from mergekit_interleave import ranges, recipe
from mergekit_interleave.checkpoint import (
    Checkpoint,
    fetch_small_files,
    fetch_weights,
    interpreted,
    is_checkpoint,
    open_checkpoint,
    unpickled,
)
from mergekit_interleave.directive import Directive
from mergekit_interleave.edits import Edits, warn_of_idle_filters
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    LayoutError,
    RefusedError,
    UnreachableError,
)
from mergekit_interleave.growth import Spelled, Stack, Step, needs_depth
from mergekit_interleave.hub import fetch_files
from mergekit_interleave.layout import Edit, Layer, Layout, expand
from mergekit_interleave.reference import ModelPath, ModelRef, parse_model
from mergekit_interleave.scaling import COPIES, NONE

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
        return recipe.to_yaml(self.layout, self.directive.mergekit, modules=self.modules)


@dataclass
class Models:
    """Source models, each opened once.

    Attributes:
        cached_only: Never ask the network.
        cache_dir: Another Hub cache than huggingface_hub's own.
        trust_remote_code: Whether code that a model brings may be run.
        unpickle_into: Where pickled weights may be written as safetensors, a directory that can be
            made; None refuses pickles.
        results: What earlier documents of a stream make, by their names; none of it is written yet.
    """

    cached_only: bool = False
    cache_dir: str | None = None
    trust_remote_code: bool = False
    unpickle_into: Path | None = None
    results: dict[str, Checkpoint] = field(default_factory=dict)
    _opened: dict[ModelRef, Checkpoint] = field(default_factory=dict)
    _failed: dict[tuple[ModelRef, bool], CheckpointError] = field(default_factory=dict)
    _unreachable: bool = False

    def open(self, ref: ModelRef) -> Checkpoint:
        """Open a model.

        Raises:
            CheckpointError: It cannot be opened; the same error each time.
        """
        result = self.results.get(ref.path)
        if result is not None:
            return dataclasses.replace(result, ref=ref)
        if ref not in self._opened:
            how = (ref, self.cached_only or self._unreachable)
            if how in self._failed:
                raise self._failed[how]
            try:
                opened = open_checkpoint(ref, cached_only=how[1], cache_dir=self.cache_dir)
            except CheckpointError as error:
                self._failed[how] = error
                # Which takes half a minute to be sure of: once is enough.
                self._unreachable |= isinstance(error, UnreachableError)
                raise
            self._opened[ref] = dataclasses.replace(opened, trusted=self.trust_remote_code)
        return self._opened[ref]

    def place(self, ref: ModelRef) -> Path:
        """Where a model is, or what it is called where it cannot be opened."""
        try:
            return self.open(ref).path
        except CheckpointError:
            return Path(str(ref))

    def fetch_small_files(self, checkpoint: Checkpoint) -> None:
        """Fetch the small files of an opened model.

        Raises:
            CheckpointError: They cannot be had.
        """
        fetch_small_files(checkpoint, cached_only=self.cached_only, cache_dir=self.cache_dir)
        if not checkpoint.is_local and not any(checkpoint.path.glob("*token*")):
            log.warning("%s: no tokenizer among its files, or not in the cache", checkpoint.ref)

    def fetch_card(self, checkpoint: Checkpoint) -> None:
        """Fetch the model card of an opened model, which may tell its license; it may have none."""
        if not checkpoint.is_local:
            with suppress(CheckpointError):
                fetch_files(
                    checkpoint.pinned,
                    wanted=["README.md"],
                    cached_only=self.cached_only,
                    cache_dir=self.cache_dir,
                )

    def with_weights(self, ref: ModelRef) -> Checkpoint:
        """Fetch the weights of a model, and read them out of pickles where that is allowed.

        Raises:
            CheckpointError: They cannot be had.
        """
        checkpoint, place = self.open(ref), self.unpickle_into
        fetch_weights(
            checkpoint,
            pickled=place is not None,
            cached_only=self.cached_only,
            cache_dir=self.cache_dir,
        )
        if place is not None:
            checkpoint = unpickled(checkpoint, place / str(len(self._opened)))
            self._opened[ref] = checkpoint
        return checkpoint


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
    recipe.check_keys_of_mergekit(directive.mergekit)
    models.cached_only = directive.layers is not None
    place = Path() if directive.model is None else models.place(directive.model)
    with interpreted(place):
        return _resolve(directive, models, strict=strict, allow_non_identity=allow_non_identity)


def _resolve(
    directive: Directive, models: Models, *, strict: bool, allow_non_identity: bool
) -> Expansion:
    if isinstance(directive.growth, Spelled):
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
    if isinstance(directive.growth, Spelled):
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
        return needs_depth(own)
    return directive.growth is not None and needs_depth(directive.growth)


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
    directive: Directive, growth: Spelled, models: Models, *, strict: bool
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
    layout = recipe.from_document(growth.document, depth_of)
    if directive.model is not None:
        if len(layout.models) > 1:
            raise DirectiveError("--model: the mergekit config names several models")
        (old,), new = layout.models, directive.model
        slices = (dataclasses.replace(part, model=new) for part in layout.slices)
        layout = Layout(tuple(slices))
        written = recipe.to_document(
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
            ranges.resolve((part.start, part.stop), depth, part.model)
    warn_of_idle_filters(layout, {model: _opened(model, models) for model in layout.models})
    return directive, layout


def _check_modules(document: Mapping[str, object], model: ModelRef, models: Models) -> None:
    """Modules beside the one that is grown must be passed on whole: they are, whatever is said."""
    checkpoint = _opened(model, models)
    known = checkpoint.modules if checkpoint else {}
    for name, count in recipe.other_modules(document).items():
        if known and known.get(name) != count:
            raise RefusedError(
                f"modules.{name}: [0, {count}] is not all of it; only {recipe.GROWN} can be changed"
            )
