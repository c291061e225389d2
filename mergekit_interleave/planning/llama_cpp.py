"""Check that llama.cpp takes each layer of a grown model for the kind that config.json states.

For some types llama.cpp does not read the kinds of the layers from a GGUF file. It derives them
from the index of a layer, with a period that is part of its code, so a layout that breaks the
period computes something else there, although transformers is exact. `Family.llama_cpp_periods`
lists the periods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import Stack, stack_of
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.layout.layout import Edit, Layer, Layout, Slice, expand
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.edits import edit_of
from mergekit_interleave.planning.grown_config import GrownConfig
from mergekit_interleave.planning.suggest import with_growth


@dataclass(frozen=True)
class Misread:
    """The first layer that llama.cpp takes for another kind than config.json states.

    Attributes:
        key: The list of layer kinds.
        layer: The index of the layer; None if no layer is taken for its kind, because of the depth.
        rule: What llama.cpp does, as a clause.
    """

    key: str
    layer: int | None
    rule: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f", unlike layer {self.layer} of config.json"
        return f"llama.cpp computes something else: {self.rule}{where} (`{self.key}`)"


def misread(config: Mapping[str, Any]) -> Misread | None:
    """Return the first layer of a model that llama.cpp takes for another kind, if there is one.

    Args:
        config: The whole config.json.
    """
    family, part = families.family_of_config(config), families.layer_config(config)
    depth = families.depth_of(part, family)
    if family is None or not isinstance(depth, int):
        return None
    if family.llama_cpp_depth not in (None, depth):
        return _misread_depth(part, family, depth)
    for key, value in family.llama_cpp_constants.items():
        if part.get(key, value) != value:
            rule = f"it always uses {value}, and config.json states {part[key]:.6g}"
            return Misread(key, None, rule)
    found = [item for key in family.llama_cpp_periods for item in _misread(part, family, key)]
    return min(found, key=lambda item: item.layer or 0, default=None)


def _misread_depth(part: Mapping[str, Any], family: Family, depth: int) -> Misread | None:
    kinds = {*(part.get("layer_types") or ())}
    if len(kinds) < 2:  # noqa: PLR2004 - layers of one kind have none to distinguish
        return None
    only = f"{family.model_type} has layer kinds there only in {family.llama_cpp_depth} layers"
    return Misread("layer_types", None, f"{only}, and this model has {depth}")


def _misread(part: Mapping[str, Any], family: Family, key: str) -> Iterator[Misread]:
    period, entry = _rule(part, family, key)
    kinds = _kinds(part, family, key)
    for index, kind in enumerate(kinds if period else ()):
        if (kind == entry) != ((index + 1) % period == 0):
            which = "every layer" if period == 1 else f"every {_ordinal(period)} layer"
            yield Misread(key, index, f"it takes {which}, and no other, for {entry!r}")
            return


def _rule(part: Mapping[str, Any], family: Family, key: str) -> tuple[int, object]:
    """Return the period and the entry of a list; the period is 0 if config.json lacks it."""
    period, entry = family.llama_cpp_periods[key]
    stated = part.get(period) if isinstance(period, str) else period
    return (stated if isinstance(stated, int) and stated > 0 else 0), entry


def _kinds(part: Mapping[str, Any], family: Family, key: str) -> Sequence[object]:
    """Return the entry of each layer in a list of layer kinds or of layer indices."""
    listed = part.get(key)
    if not isinstance(listed, list | tuple):
        return ()
    if key not in family.facts.layer_indices:
        return listed
    depth = families.depth_of(part, family)
    return [index in listed for index in range(depth if isinstance(depth, int) else 0)]


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def warning(grown: GrownConfig, directive: Directive) -> str | None:
    """Warn of a result that llama.cpp computes differently from transformers.

    Args:
        grown: The config.json of the result.
        directive: Its directive.
    """
    found = misread(grown.config())
    if found is None:
        return None
    if _base_is_misread(grown):
        return f"{found}; so it does with the base"
    works = nearest(grown, directive)
    return f"{found}; {KEEPS.format(works)}" if works else str(found)


KEEPS = "this keeps its period: {}"
"""The words before a directive that llama.cpp computes alike."""


def alternative(grown: GrownConfig, directive: Directive) -> str | None:
    """Return the nearest directive that llama.cpp computes alike, if it misreads a result.

    Args:
        grown: The config.json of the result.
        directive: Its directive.
    """
    is_misread = misread(grown.config()) is not None and not _base_is_misread(grown)
    return nearest(grown, directive) if is_misread else None


def nearest(grown: GrownConfig, directive: Directive) -> str | None:
    """Return the directive closest to a given one that llama.cpp computes alike, if any.

    It copies groups of layers whose length is a multiple of the period, so each layer keeps its
    place in the period. Its new layers are edited as those of the given directive.

    Args:
        grown: The config.json of the result of the given directive.
        directive: The given directive.
    """
    base, layout = grown.first, grown.layout
    periods = _periods(base)
    if len(layout.models) > 1 or not periods or math.lcm(*periods) > base.depth:
        return None
    growth = copied_periods(base.depth, math.lcm(*periods), len(layout) - base.depth)
    if growth is None:
        return None
    other = with_growth(growth, directive, base, layout)
    if other is None:
        return None
    # The warnings about the directive have already been collected.
    by_source = edit_of(other.zero_rule, base, lambda _: None)

    def edit(layer: Layer) -> Edit:
        return Edit() if by_source is None else by_source(layer.source)

    try:
        trial = grown_config.grow({base.ref: base}, expand(growth, base.ref, base.depth, edit))
    except InterleaveError:
        return None
    works = misread(trial.config()) is None
    return yaml_io.write_inline(other.to_document()) if works else None


def copied_periods(depth: int, period: int, wanted: int) -> Stack | None:
    """Return a stack that copies whole periods, evenly spread, with about as many new layers.

    Args:
        depth: The number of layers of the base.
        period: The number of layers of a period.
        wanted: The number of new layers of the given directive.

    Returns:
        The stack, or None if nothing is to be added.
    """
    if wanted < 1:
        return None
    whole = depth // period
    copies = min(max(1, round(wanted / period)), whole)
    ends = [-(-whole * (i + 1) // copies) * period for i in range(copies)]
    starts = [0, *(end - period for end in ends)]
    return stack_of(zip(starts, [*ends, depth], strict=True))


def _periods(base: Checkpoint) -> list[int]:
    family, part = base.require_family(), base.layer_config
    return [p for key in family.llama_cpp_periods if (p := _rule(part, family, key)[0])]


def _base_is_misread(grown: GrownConfig) -> bool:
    """Whether llama.cpp misreads the only source, with the lists that its class computes."""
    base = grown.first
    same = Layout((Slice(base.ref, 0, base.depth),))
    of_base = grown_config.grow({base.ref: base}, same)
    return len(grown.layout.models) == 1 and misread(of_base.config()) is not None
