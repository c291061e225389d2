"""Which directive would work, where no config.json can say the one that was given."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from mergekit_interleave import modelconfig, structure, yamltext
from mergekit_interleave.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.directive import AUTO, Append, Directive, Every, Growth, Stack
from mergekit_interleave.errors import InterleaveError, RefusedError
from mergekit_interleave.layout import Edit, Layout, expand

_MOST_BUILT = 6  # building a large model's layers without memory takes a second or two


def suggestion(base: Checkpoint, layout: Layout, growth: Growth | None) -> str | None:
    """A directive for a model that its config.json can say, as near as may be to one it cannot.

    Args:
        base: The model.
        layout: The layers that were asked for.
        growth: The growth line that asked for them.
    """
    edits = {layer.edit for layer in layout.new_layers}
    edit = edits.pop() if len(edits) == 1 else Edit()
    built = 0
    for other in _candidates(growth, base.depth, len(layout) - base.depth):
        trial = _expanded(other, base, lambda _: edit)
        if trial is None:
            continue
        built += 1
        if built > _MOST_BUILT:
            break
        if _is_built(base, trial):
            zero = AUTO if isinstance(other, Stack) and edit else None
            return yamltext.write_inline(Directive(growth=other, zero=zero).to_document())
    return None


def _candidates(growth: Growth | None, depth: int, wanted: int) -> Iterator[Growth]:
    steps = sorted(range(1, depth + 1), key=lambda step: abs(depth // step - wanted))
    every, append = map(Every, steps), map(Append, range(1, wanted + 1))
    yield from chain(append, every) if isinstance(growth, Append) else chain(every, append)
    # Groups of layers, at the same place in each period.
    sizes = [size for size in range(2, depth + 1) if depth % size == 0]
    for period in sorted(sizes, key=lambda size: abs(size - 8)):
        for group in range(2, period + 1):
            whole = [(start, start + period) for start in range(0, depth, period)]
            yield Stack(tuple(r for s, e in whole for r in ((s, e), (e - group, e))))
            yield Stack(tuple(r for s, e in whole for r in ((s, s + group), (s, e))))


def _expanded(growth: Growth, base: Checkpoint, edit: Callable[[int], Edit]) -> Layout | None:
    try:
        layout = expand(growth, base.ref, base.depth, edit)
        modelconfig.placement_of(base, layout)
    except InterleaveError:
        return None
    return layout


def _is_built(base: Checkpoint, layout: Layout) -> bool:
    placement = modelconfig.placement_of(base, layout)
    config = modelconfig.deepened(base, layout, placement)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            structure.check(base, layout, Path(folder), placement.borrowers)
        except RefusedError:
            return False
    return True
