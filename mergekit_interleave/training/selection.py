"""Select what to train: certain layers, and the embeddings or the head.

Torch is not imported here: a model is used only through the methods of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.directive import layer_range
from mergekit_interleave.errors import DirectiveError, RefusedError, nearest
from mergekit_interleave.layout import roles
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import layer_map
from mergekit_interleave.planning import zeroing

NEW, SEAMS = "new", "seams"
"""The words that select layers by their role; a range such as `8:24` selects them by index."""

HEAD, EMBEDDINGS = "lm_head", "embed_tokens"
"""The names of the head and the embeddings, beside those of the model's class."""


def select(
    layout: Layout,
    family: Family | None,
    words: str = NEW,
    *,
    model: str = "the model",
    option: Callable[[str], str] = "--layers {}".format,
) -> tuple[int, ...]:
    """Return the indices of the layers to train, in order.

    Args:
        layout: The layers of the model.
        family: The family of the model, or None if it is unknown.
        words: `new`, `seams` (the layers at both sides of each seam) or a range of the model's
            layers such as `8:24`; several are separated by commas.
        model: The model, to be named in errors.
        option: Returns the words that select other layers, for a hint.

    Raises:
        DirectiveError: The words select no layers in any model.
        LayoutError: The model has no such layers.
        RefusedError: The model has no new layers, or no seams.
    """
    new = [layer.index for layer in layout.new_layers]
    passing = zeroing.identities(layout, lambda _: family or families.assumed_family())
    seams = roles.seam_layers(layout, passing)
    known = {NEW: new, SEAMS: seams}
    if wanting := [word for word in _words(words) if word in known and not known[word]]:
        others = layer_map.others(layout, passing).removeprefix(", ")
        what = f"{'new layers' if wanting == [NEW] else 'merge seams'}{others and f' ({others})'}"
        other = next((word for word, found in known.items() if found), f"0:{len(layout)}")
        raise RefusedError(
            f"{model} has no {what}, so there is nothing to train",
            hint=f"name other layers: {option(other)}",
        )
    chosen: set[int] = set()
    for word in _words(words):
        chosen.update(known[word] if word in known else _range(word, layout, model, option))
    return tuple(sorted(chosen))


def _words(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


def _range(word: str, layout: Layout, model: str, option: Callable[[str], str]) -> range:
    if not layer_range.is_range(word):
        close = nearest(word, (NEW, SEAMS))
        last = option(f"{len(layout) - 1}:{len(layout)}")
        raise DirectiveError(
            f"layers: expected new, seams or a range such as 8:24, found {word!r:.80}",
            hint=f"did you mean {close}?" if close else f"the last layer is {last}",
        )
    written = layer_range.parse_range(word, "layers")
    return range(*layer_range.resolve(written, len(layout), model))


def outside_layers(model: Any, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the modules outside the layers that are to be trained too, each with its path.

    Args:
        model: A model of transformers.
        names: Names as `known_outside` has them.

    Raises:
        DirectiveError: The model has no such module.
    """
    known = known_outside(model)
    for name in names:
        if name not in known:
            raise DirectiveError(
                f"also: the model has no {name!r:.80} outside its layers",
                hint=f"known names: {', '.join(known)}" if known else None,
            )
        yield known[name]


def parameters_outside(model: Any, names: Collection[str]) -> list[str]:
    """Return all names of the parameters outside the layers that are to be trained too.

    Args:
        model: A model of transformers.
        names: Names as `known_outside` has them.

    Raises:
        DirectiveError: The model has no such module.
    """
    wanted = {id(p) for _, module in outside_layers(model, names) for p in module.parameters()}
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if id(parameter) in wanted]


def known_outside(model: Any) -> Mapping[str, tuple[str, Any]]:
    """Return the head and the embeddings of a model by their names, each with its path.

    The names are `lm_head` and `embed_tokens`, and the last components of those in its class.
    """
    found: dict[str, tuple[str, Any]] = {}
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    for name, get in ((HEAD, "get_output_embeddings"), (EMBEDDINGS, "get_input_embeddings")):
        with suppress(AttributeError, NotImplementedError):
            module = getattr(model, get)()
            if id(module) in paths:
                path = paths[id(module)]
                found |= {name: (path, module), path.rpartition(".")[2]: (path, module)}
    return found
