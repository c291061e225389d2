"""Restate the rules by which PEFT selects what it adapts.

Most trainers pass their LoRA settings on to PEFT, so these rules are shared. They follow the source
of PEFT 0.21.2, which is not imported. All functions are pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable


def adapted_modules(
    modules: Iterable[str],
    targets: str | Collection[str],
    layers: Collection[int] | None = None,
    pattern: str | None = None,
) -> set[str]:
    """Return the modules that PEFT adapts (`check_target_module_exists`).

    Args:
        modules: The names of all modules.
        targets: `target_modules`: one regular expression that matches whole names, or a list of
            name endings.
        layers: `layers_to_transform`, which restricts a list of endings.
        pattern: `layers_pattern`: the name components before a layer's index. Without it any
            component is accepted, and the first number in a name is the index.
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


SHORTENED_FROM = 20
"""PEFT shortens a list of this many `target_modules` or more. It then matches the shorter list
differently if `layers_to_transform` is set."""

EXPERT_NAMES = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
"""The last components of `target_modules` that PEFT treats as experts, in model types that once had
one module per expert. It then adapts the experts of all layers, regardless of other settings."""

MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
MAMBA_REFUSED = frozenset({"conv1d", "out_proj"})
"""The modules that PEFT refuses to adapt in models of the `MAMBA_TYPES`."""


def adapted_parameters(parameters: Iterable[str], targets: Collection[str]) -> set[str]:
    """Return the parameters that PEFT adapts by `target_parameters`: names or endings."""
    return {name for name in parameters if _ends(name, targets)}


def saved_modules(modules: Iterable[str], names: Collection[str]) -> set[str]:
    """Return the modules that PEFT trains in full by `modules_to_save`.

    Its entries are name endings, and an ending may begin within a component.
    """
    return {name for name in modules if any(name.endswith(ending) for ending in names)}


def _ends(name: str, endings: Collection[str]) -> bool:
    return name in endings or any(name.endswith(f".{ending}") for ending in endings)
