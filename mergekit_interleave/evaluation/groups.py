"""Find the items of a task that depend on each other. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LEAST_CHARACTERS = 200
"""A shorter text that items share may be an answer, an instruction or a name."""

_LEAST_GROUPS = 10
"""With fewer groups, an interval would tell nothing; such a text is rather an instruction."""


def groups_of(documents: Sequence[Mapping[str, object]]) -> tuple[int, ...]:
    """Return the number of the group of each item; items that share a passage are one group.

    A passage is a long text in a field of the data set, such as `passage` or `article`, that stands
    there for several items. lm-eval does not record groups.

    Args:
        documents: The items, with the same fields each.
    """
    alone = tuple(range(len(documents)))
    for field in documents[0] if documents else ():
        texts = [each.get(field) for each in documents]
        if all(isinstance(text, str) and len(text) >= _LEAST_CHARACTERS for text in texts):
            numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
            if _LEAST_GROUPS <= len(numbers) < len(documents):
                return tuple(numbers[text] for text in texts)
    return alone
