"""Predict what plain `mergekit-yaml` writes for a recipe, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.errors import (
    CheckpointError,
    RefusedError,
    UnrepresentableError,
    collected_warnings,
    nearest,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import compatibility, grown_config
from mergekit_interleave.planning.resolve import Expansion

# mergekit treats a path of at most this many parts as a Hub id, even if the directory exists.
_MAX_ID_PARTS = 2

_BY_RUN = "write the model from the same directive with `mk-interleave run`"


def check(expansion: Expansion) -> tuple[str, ...]:
    """Check that `mergekit-yaml` writes correct tensors.

    Args:
        expansion: The directive and its layout.

    Returns:
        Warnings, for example that the config.json may be wrong.

    Raises:
        RefusedError: No mergekit config can represent the layout, mergekit would write wrong
            tensors, or no config.json can represent the result.
    """
    with collected_warnings() as warnings:
        mergekit_yaml.check_representable(expansion.layout)
        types = {checkpoint.model_type: None for checkpoint in expansion.checkpoints.values()}
        if len(types) > 1:
            warnings.append(
                f"the models have different types ({', '.join(types)}): mergekit-yaml stacks them "
                "only with --allow-crimes, and does not check that they fit"
            )
        if expansion.first is not None:  # otherwise `resolve` has warned
            warnings.extend(_warnings_of(expansion.first))
            warnings.extend(_check_family(expansion.first, expansion))
            warnings.extend(_differing(expansion.first, expansion))
        return tuple(warnings)


def _warnings_of(checkpoint: Checkpoint) -> Iterator[str]:
    path = checkpoint.ref.path
    if checkpoint.is_local and path[0] not in "./~" and path.count("/") < _MAX_ID_PARTS:
        yield f"mergekit will look up {path} on the Hub for its model card: write ./{path} instead"
    if checkpoint.family is not None and checkpoint.family.own_code:
        yield (
            f"mergekit-yaml runs the code of model type {checkpoint.model_type}, and needs "
            "--trust-remote-code"
        )
    if checkpoint.family is None:
        name = checkpoint.model_type
        close = nearest(name, families.known_types())
        reason = f"model type {name!r} is unknown" if name else "config.json has no model_type"
        guess = f" (did you mean {close}?)" if close else ""
        yield f"{reason}{guess}: mergekit-yaml alone may write a wrong model"


def _check_family(checkpoint: Checkpoint, expansion: Expansion) -> tuple[str, ...]:
    if checkpoint.family is None:
        return ()
    placed = placed_keys(expansion)
    _check_tensors(checkpoint, checkpoint.require_family(), expansion.layout)
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


def _differing(first: Checkpoint, expansion: Expansion) -> Iterator[str]:
    """Yield a warning for each model whose settings may prevent a stack; mergekit checks none."""
    for model in expansion.layout.models[1:]:
        other = expansion.checkpoints.get(model)
        if other is None or other.family is None or first.family is None:
            continue
        keys = [found.key for found in compatibility.by_name(other, first)]
        if keys:
            yield (
                f"{model} and {first.ref} differ in {', '.join(keys[:3])}, and mergekit-yaml does "
                "not check that: `mk-interleave plan` says whether their layers can be stacked"
            )


def placed_keys(expansion: Expansion) -> Mapping[str, Any]:
    """Return the keys of config.json that must change besides the depth."""
    sources, layout = expansion.checkpoints, expansion.layout
    if any(model not in sources or not sources[model].family for model in layout.models):
        return {}
    try:
        return grown_config.grow(sources, layout, only_stated=True).placement.config
    except UnrepresentableError as error:
        error.hint = "`mk-interleave run` refuses it too, and suggests a directive that works"
        raise
    except CheckpointError:
        return {}  # the depth is unknown


def _check_tensors(checkpoint: Checkpoint, family: Family, layout: Layout) -> None:
    if not family.mergekit_defined and layout.slices[0].model != layout.slices[-1].model:
        raise RefusedError(
            f"mergekit-yaml alone would take the tensors after the layers of model type "
            f"{checkpoint.model_type} from {layout.slices[0].model} instead of the last model",
            hint=_BY_RUN,
        )
    if checkpoint.is_quantized or (
        family.mergekit_result(checkpoint.layer_config) == families.WRONG_TENSORS
    ):
        kind = ", quantized" if checkpoint.is_quantized else ""
        raise RefusedError(
            f"mergekit-yaml alone fails or writes wrong tensors for model type "
            f"{checkpoint.model_type}{kind}",
            hint=_BY_RUN,
        )
    if family.mergekit_modules and not checkpoint.modules:
        raise RefusedError(
            f"{checkpoint.ref}: config.json lacks the layer counts of the other modules, which a "
            "mergekit config needs",
            hint=_BY_RUN,
        )
