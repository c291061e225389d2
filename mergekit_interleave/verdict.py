"""What plain `mergekit-yaml` makes of a recipe, known without asking it: that takes seconds."""

from __future__ import annotations

import logging

from mergekit_interleave import architecture, modelconfig, recipe
from mergekit_interleave.checkpoint import Checkpoint
from mergekit_interleave.errors import CheckpointError, RefusedError, UnsayableError
from mergekit_interleave.expand import Expansion, Models
from mergekit_interleave.layout import Layout

log = logging.getLogger(__name__)

_BY_RUN = "`mk-interleave run` takes the same directive and writes the model"


def check(expansion: Expansion, models: Models) -> None:
    """Check that `mergekit-yaml` writes the right tensors, and warn where its config is broken.

    Args:
        expansion: What it is to write.
        models: Where the source models are opened.

    Raises:
        RefusedError: No mergekit config can say it, mergekit writes wrong tensors, or no
            config.json can say the result.
    """
    recipe.check_sayable(expansion.layout)
    try:
        checkpoint = models.open(expansion.layout.models[0])
    except CheckpointError:
        return  # which `resolve` has warned of
    _check_tensors(checkpoint)
    if checkpoint.family is None or _breaks_config(checkpoint, expansion.layout):
        log.warning(
            "mergekit-yaml alone may leave a wrong config.json for model type %s: mend it by "
            "`mk-interleave fix-config OUT`, or let `mk-interleave run` write the model",
            checkpoint.model_type,
        )


def _check_tensors(checkpoint: Checkpoint) -> None:
    family = checkpoint.family
    verdict = family.verdict(checkpoint.layer_config) if family else None
    if checkpoint.is_quantized or verdict == architecture.WRONG_TENSORS:
        kind = ", quantized" if checkpoint.is_quantized else ""
        raise RefusedError(
            f"mergekit-yaml alone writes wrong tensors for model type {checkpoint.model_type}"
            f"{kind}, or none",
            hint=_BY_RUN,
        )
    if family and family.modules and not checkpoint.modules:
        raise RefusedError(
            f"{checkpoint.ref}: its config.json does not say how many layers its other models "
            "have, which a mergekit config must",
            hint=_BY_RUN,
        )


def _breaks_config(checkpoint: Checkpoint, layout: Layout) -> bool:
    """Whether mergekit leaves more of config.json as it was than it may."""
    config, family = checkpoint.layer_config, checkpoint.family
    if family is not None and family.verdict(config) != architecture.EXACT:
        return True
    if len(layout.models) > 1:
        return False
    try:
        placed = modelconfig.stated_placement(checkpoint, layout).config
    except UnsayableError as error:
        error.hint = "`mk-interleave run` names a directive that would do"
        raise
    except CheckpointError:
        return False  # the depth is not known
    return any(config.get(key) != value for key, value in placed.items())
