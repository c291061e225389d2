"""Suggest a directive that works, for one that config.json cannot represent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import chain

from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.checkpoint.models import Source
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import Append, Every, Growth, stack_of
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.layout.layout import Edit, Layer, Layout, expand
from mergekit_interleave.planning import grown_config, structure_check
from mergekit_interleave.planning.edits import edit_of
from mergekit_interleave.planning.grown_config import GrownConfig
from mergekit_interleave.planning.shortest import KnownModels
from mergekit_interleave.planning.tensor_plan import assemble

_MAX_BUILT = 6  # building a large model on the meta device takes a second or two


def suggestion(base: Checkpoint, directive: Directive, layout: Layout) -> str | None:
    """Return the directive closest to the given one that config.json can represent, if any.

    Args:
        base: The model. Without its weights, nothing is suggested.
        directive: The given directive.
        layout: Its layers. For those of several models, nothing is suggested.
    """
    if not base.has_weights or len(layout.models) > 1:
        return None
    # The warnings about the directive have already been collected.
    by_source, built = edit_of(directive.zero_rule, base, lambda _: None), 0

    def edit(layer: Layer) -> Edit:
        return Edit() if by_source is None else by_source(layer.source)

    for growth in _candidates(directive.growth, base.depth, len(layout) - base.depth):
        try:
            trial = expand(growth, base.ref, base.depth, edit)
            grown = grown_config.grow({base.ref: base}, trial)
        except InterleaveError:
            continue
        built += 1
        if built > _MAX_BUILT:
            break
        if _is_loaded(grown, base):
            other = with_growth(growth, directive, base, layout)
            return None if other is None else yaml_io.write_inline(other.to_document())
    return None


def with_growth(
    growth: Growth, directive: Directive, base: Source, layout: Layout
) -> Directive | None:
    """Return a directive with another growth line that edits new layers as a given one does.

    Args:
        growth: The other growth line.
        directive: The given directive.
        base: Its only model.
        layout: Its layers.

    Returns:
        The directive, or None if the given one edits single steps or is damped, which the other
        line lacks.
    """
    given: Directive | None = directive
    if directive.growth is not None and directive.growth.damping > 1:
        return None
    if directive.growth is not None and directive.growth.edits_itself:
        known = KnownModels(lambda _: base, lambda _: base.depth)
        given = known.shortest(layout, directive.growth)
    if given is None or (given.growth is not None and given.growth.edits_itself):
        return None
    zero = None if given.zero_rule == growth.default_zero else given.zero_rule
    return Directive(
        growth=growth,
        zero=zero,
        scale=given.scale,
        apply_to=given.apply_to,
        from_=given.from_ if isinstance(growth, Every) else None,
    )


def _candidates(growth: Growth | None, depth: int, wanted: int) -> Iterator[Growth]:
    steps = sorted(range(1, depth + 1), key=lambda step: abs(depth // step - wanted))
    every, append = map(Every, steps), map(Append, range(1, wanted + 1))
    yield from chain(append, every) if isinstance(growth, Append) else chain(every, append)
    # Groups of layers at the same place in each period.
    sizes = [size for size in range(2, depth + 1) if depth % size == 0]
    for period in sorted(sizes, key=lambda size: abs(size - 8)):
        for group in range(2, period + 1):
            periods = [(start, start + period) for start in range(0, depth, period)]
            yield stack_of(
                part for start, stop in periods for part in ((start, stop), (stop - group, stop))
            )
            yield stack_of(
                part for start, stop in periods for part in ((start, start + group), (start, stop))
            )


def _is_loaded(grown: GrownConfig, base: Checkpoint) -> bool:
    """Whether the model class loads each layer as it is stored."""
    specs = assemble(
        grown.layout, {base.ref: base}, kv_sharing_layers=grown.placement.kv_sharing_layers
    )
    with scratch_directory() as folder:
        try:
            (folder / CONFIG).write_text(json.dumps(grown.config()), encoding="utf-8")
            if not meta_model.has_class(folder, trusted=base.trusted):
                return True  # as `run` accepts it
            for file in base.path.glob("*.py"):
                shutil.copy(file, folder)
            forms = structure_check.forms_of(specs)
            structure_check.check(folder, forms, [base], depth=len(grown.layout))
        except InterleaveError:
            return False
    return True
