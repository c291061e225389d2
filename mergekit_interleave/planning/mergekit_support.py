"""What plain `mergekit-yaml` makes of a recipe, known without asking it: that takes seconds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.errors import CheckpointError, RefusedError, UnsayableError, nearest
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.resolve import Expansion

log = logging.getLogger(__name__)

_MOST_WORDS = 2  # of what mergekit takes for a Hub id, wherever such a directory stands

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
    mergekit_yaml.check_sayable(expansion.layout)
    try:
        checkpoint = models.open(expansion.layout.models[0])
    except CheckpointError:
        return  # which `resolve` has warned of
    path = checkpoint.ref.path
    if checkpoint.is_local and path[0] not in "./~" and path.count("/") < _MOST_WORDS:
        log.warning(
            "mergekit asks the Hub about %s when it writes its card: write ./%s", path, path
        )
    if checkpoint.family is None:
        name = checkpoint.model_type
        close = nearest(name, families.known_types())
        log.warning(
            "nothing is known of %s%s: mergekit-yaml alone may write a wrong model",
            f"model type {name!r}" if name else "a config.json without model_type",
            f" (did you mean {close}?)" if close else "",
        )
        return
    placed = _placed(checkpoint, expansion.layout)
    _check_tensors(checkpoint, checkpoint.require_family())
    config = checkpoint.layer_config
    if checkpoint.family.mergekit_result(config) != families.EXACT or any(
        config.get(key) != value for key, value in placed.items()
    ):
        log.warning(
            "mergekit-yaml alone may leave a wrong config.json for model type %s: mend it by "
            "`mk-interleave fix-config OUT --recipe FILE`, or let `mk-interleave run` write the "
            "model",
            checkpoint.model_type,
        )


def _placed(checkpoint: Checkpoint, layout: Layout) -> Mapping[str, Any]:
    """What config.json must say besides the depth."""
    if len(layout.models) > 1:
        return {}
    try:
        return grown_config.stated_placement(checkpoint, layout).config
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
