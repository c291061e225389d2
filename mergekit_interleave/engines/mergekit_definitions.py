"""Ask mergekit's definition of a model class which tensors the class needs.

The definition is data, so this works without the code of the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint.checkpoint import config_errors
from mergekit_interleave.planning.expansion_plan import ExpansionPlan


def missing(plan: ExpansionPlan) -> Sequence[str]:
    """Return the tensors that the class of a result needs and the result lacks, by their names.

    None is returned for a class that mergekit does not define. If it has several definitions of the
    class, the one that fits best counts.
    """
    from mergekit.architecture.json_definitions import NAME_TO_ARCH  # noqa: PLC0415 - takes seconds
    from transformers import PretrainedConfig  # noqa: PLC0415

    # The class may state the depth under another key than the definition does.
    config = dict.fromkeys(families.depth_keys(), len(plan.layout)) | plan.config()
    name = (config.get("architectures") or [""])[0]
    names = {spec.name for spec in plan.specs}
    with config_errors(plan.first.path):
        loaded = PretrainedConfig.from_dict(config)
        lacking = [_lacking(each, loaded, names) for each in NAME_TO_ARCH.get(name, ())]
    return min(lacking, key=len, default=())


def _lacking(definition: Any, config: Any, names: set[str]) -> list[str]:
    return [
        weight.name
        for weight in definition.all_weights(config)
        if not weight.optional
        and names.isdisjoint((weight.name, *(weight.aliases or ()), *(weight.tied_names or ())))
    ]
