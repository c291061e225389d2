"""Predict what plain `mergekit-yaml` makes of a recipe. To run it would take seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.errors import (
    CheckpointError,
    RefusedError,
    UnsayableError,
    collected_warnings,
    nearest,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.resolve import Expansion

_MOST_WORDS = 2  # of what mergekit takes for a Hub id, even where such a directory exists

_BY_RUN = "`mk-interleave run` takes the same directive and writes the model"


def check(expansion: Expansion) -> tuple[str, ...]:
    """Check that `mergekit-yaml` writes the right tensors.

    Args:
        expansion: What it is to write.

    Returns:
        Warnings, where its config.json may be wrong.

    Raises:
        RefusedError: No mergekit config can represent the layout, mergekit writes wrong tensors, or
            no config.json can represent the result.
    """
    with collected_warnings() as warnings:
        mergekit_yaml.check_sayable(expansion.layout)
        if expansion.first is not None:  # otherwise `resolve` has warned
            warnings.extend(_warnings_of(expansion.first))
            warnings.extend(_check_family(expansion.first, expansion.layout))
        return tuple(warnings)


def _warnings_of(checkpoint: Checkpoint) -> Iterator[str]:
    path = checkpoint.ref.path
    if checkpoint.is_local and path[0] not in "./~" and path.count("/") < _MOST_WORDS:
        yield f"mergekit asks the Hub about {path} when it writes its card: write ./{path}"
    if checkpoint.family is None:
        name = checkpoint.model_type
        close = nearest(name, families.known_types())
        what = f"model type {name!r}" if name else "a config.json without model_type"
        meant = f" (did you mean {close}?)" if close else ""
        yield f"nothing is known of {what}{meant}: mergekit-yaml alone may write a wrong model"


def _check_family(checkpoint: Checkpoint, layout: Layout) -> tuple[str, ...]:
    if checkpoint.family is None:
        return ()
    placed = _placed(checkpoint, layout)
    _check_tensors(checkpoint, checkpoint.require_family())
    config = checkpoint.layer_config
    if checkpoint.family.mergekit_result(config) == families.EXACT and all(
        config.get(key) == value for key, value in placed.items()
    ):
        return ()
    warning = (
        "mergekit-yaml alone may leave a wrong config.json for model type "
        f"{checkpoint.model_type}: fix it with `mk-interleave fix-config OUT --recipe FILE`, or "
        "let `mk-interleave run` write the model"
    )
    return (warning,)


def _placed(checkpoint: Checkpoint, layout: Layout) -> Mapping[str, Any]:
    """What config.json must say besides the depth."""
    if len(layout.models) > 1:
        return {}
    try:
        sources = {checkpoint.ref: checkpoint}
        return grown_config.grow(sources, layout, only_stated=True).placement.config
    except UnsayableError as error:
        error.hint = "`mk-interleave run` names a directive that would do"
        raise
    except CheckpointError:
        return {}  # the depth is not known


def _check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    if checkpoint.is_quantized or (
        family.mergekit_result(checkpoint.layer_config) == families.WRONG_TENSORS
    ):
        kind = ", quantized" if checkpoint.is_quantized else ""
        raise RefusedError(
            f"mergekit-yaml alone writes wrong tensors for model type {checkpoint.model_type}"
            f"{kind}, or none",
            hint=_BY_RUN,
        )
    if family.mergekit_modules and not checkpoint.modules:
        raise RefusedError(
            f"{checkpoint.ref}: its config.json does not say how many layers its other models "
            "have, which a mergekit config must",
            hint=_BY_RUN,
        )
