"""What each trainer makes of the names in its settings: which parameters it trains or adapts. Pure.

Each function is one trainer's rule, written down again from its source, as it stands in the release
or at the day that is named; nothing of a trainer is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence


def peft_modules(
    modules: Iterable[str],
    targets: str | Collection[str],
    layers: Collection[int] | None = None,
    pattern: str | None = None,
) -> set[str]:
    """The modules that PEFT adapts (0.21.2, `check_target_module_exists`).

    Args:
        modules: The names of all.
        targets: `target_modules`: one regular expression for whole names, or a list of endings.
        layers: `layers_to_transform`, for a list.
        pattern: `layers_pattern`: what stands before a layer's index; by default any word, and then
            the first number in a name is the index.
    """
    if isinstance(targets, str):
        return {name for name in modules if re.fullmatch(targets, name)}
    found = set()
    before = r".*?\.[^.]*" if pattern is None else rf"(?:^|.*?\.){pattern}"
    for name in modules:
        if name in targets:
            found.add(name)
        elif any(name.endswith(f".{target}") for target in targets):
            index = re.match(rf"{before}\.(\d+)\.", name)
            if layers is None or (index is not None and int(index[1]) in layers):
                found.add(name)
    return found


PEFT_CONDENSED = 20
"""So many `target_modules` PEFT 0.21.2 shortens to fewer, which are then matched otherwise where
there are `layers_to_transform`."""

PEFT_RENAMED = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
"""Last words of `target_modules` that PEFT 0.21.2 takes for experts' where a type once had a module
for each expert: it then adapts the experts of all layers, whatever else is said."""


PEFT_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
PEFT_NO_MAMBA = frozenset({"conv1d", "out_proj"})
"""Model types in which PEFT 0.21.2 refuses to adapt modules of these names."""


def peft_parameters(parameters: Iterable[str], targets: Collection[str]) -> set[str]:
    """The parameters that PEFT adapts by `target_parameters`: names or endings, in all layers."""
    return {name for name in parameters if _ends(name, targets)}


def peft_saved(modules: Iterable[str], names: Collection[str]) -> set[str]:
    """The modules that PEFT trains in full by `modules_to_save`: endings, even of a word."""
    return {name for name in modules if any(name.endswith(ending) for ending in names)}


def axolotl(parameters: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The parameters that axolotl trains by `unfrozen_parameters` (2026-07-24, utils/freeze.py).

    A pattern is matched from the start of a name; its dots are dots, but for `.+`.
    """
    regexes = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in patterns]
    return {name for name in parameters if any(regex.match(name) for regex in regexes)}


def llamafactory_depth(config: object) -> int | None:
    """How many layers LLaMA-Factory takes a model to have, by its config object."""
    own = getattr(config, "text_config", config)
    return next(filter(None, (getattr(own, key, None) for key in _DEPTHS)), None)


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")


def llamafactory_layers(depth: int, count: int, *, llama_pro: bool) -> tuple[int, ...]:
    """The layers that LLaMA-Factory trains in its freeze mode (2026-08-18, model/adapter.py).

    Args:
        depth: The number of layers.
        count: `freeze_trainable_layers`.
        llama_pro: `use_llama_pro`.
    """
    if llama_pro:
        if count < 1 or depth % count:
            return ()
        stride = depth // count
        return tuple(range(stride - 1, depth + stride - 1, stride))
    if count > 0:
        return tuple(range(max(0, depth - count), depth))
    return tuple(range(min(-count, depth)))


def llamafactory(
    parameters: Iterable[str], layers: Sequence[int], modules: Collection[str] = ("",)
) -> set[str]:
    """The parameters that LLaMA-Factory trains in its freeze mode, of these layers.

    It looks for the index anywhere in a name, and for the module behind it.

    Args:
        parameters: The names of all.
        layers: See `llamafactory_layers`.
        modules: `freeze_trainable_modules`; the empty one stands for its `all`.
    """
    marks = [f".{index}.{module}" for index in layers for module in modules]
    return {name for name in parameters if any(mark in name for mark in marks)}


def llamafactory_modules(parameters: Iterable[str]) -> set[str]:
    """What `freeze_trainable_modules` may name: what the first two layers have."""
    parted = (re.split(r"\.0\.|\.1\.", name)[1:] for name in parameters)
    return {parts[-1].partition(".")[0] for parts in parted if parts}


def llamafactory_lora(modules: Iterable[str], targets: Collection[str]) -> set[str]:
    """The modules that LLaMA-Factory adapts by `lora_target` in a model of images.

    It looks for the words anywhere in a name; in other models it hands them to PEFT.
    """
    return {name for name in modules if any(target in name for target in targets)}


def swift(parameters: Iterable[str], prefixes: Collection[str]) -> set[str]:
    """The parameters that ms-swift trains by `trainable_parameters`: beginnings of names."""
    return {name for name in parameters if name.startswith(tuple(prefixes))}


def _ends(name: str, endings: Collection[str]) -> bool:
    return name in endings or any(name.endswith(f".{ending}") for ending in endings)
