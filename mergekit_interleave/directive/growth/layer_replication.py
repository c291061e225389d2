"""The growth line `layer_replication: [[0, 16], [8, 24]]`, as PEFT's `LoraConfig` has it.

It stacks ranges of one model, like `stack`, which is how it is written back.
"""

from __future__ import annotations

from mergekit_interleave.directive.growth.base import Growth, Line, Named, Schema
from mergekit_interleave.directive.growth.stack import stack_of
from mergekit_interleave.errors import DirectiveError

KEY = "layer_replication"


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    pairs = value if isinstance(value, list) else []
    ranges = [(pair[0], pair[1]) for pair in pairs if _is_pair(pair)]
    if not ranges or len(ranges) < len(pairs):
        raise DirectiveError(
            f"{where}: expected PEFT's list of [START, STOP], found {value!r:.200}",
            hint=f"for example `{KEY}: [[0, 4], [2, 5]]`",
        )
    return stack_of(ranges)


def _is_pair(value: object) -> bool:
    match value:
        case [int(start), int(stop)]:
            return 0 <= start < stop
    return False


def _schema() -> Schema:
    index: Schema = {"type": "integer", "minimum": 0}
    return {
        "description": "PEFT's form of `stack`: half-open ranges of one model, one after another.",
        "type": "array",
        "minItems": 1,
        "items": {"type": "array", "items": index, "minItems": 2, "maxItems": 2},
        "examples": [[[0, 4], [2, 5]]],
    }


LINE = Line(KEY, _read, _schema)
