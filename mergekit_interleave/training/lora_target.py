"""Find the PEFT settings for a LoRA that adapts all new layers and nothing else.

There are several forms of these settings, and no form fits every model. The first form that
selects exactly the new layers is used. All functions are pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mergekit_interleave.checkpoint.layer_names import inside
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.training import peft_rules
from mergekit_interleave.training.target import TrainingTarget


@dataclass(frozen=True)
class LoraTarget:
    """The PEFT settings that select what is adapted; other trainers pass them on to PEFT.

    Attributes:
        modules: `target_modules`: a list of name endings, or one regular expression.
        layers: `layers_to_transform`, needed if the endings occur in all layers.
        pattern: `layers_pattern`.
        parameters: `target_parameters`: weights that are not modules.
        saved: The modules of the layers that are trained in full, by `modules_to_save`.
        also: The modules outside the layers that are trained in full, by `modules_to_save`.
    """

    modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    pattern: str | None = None
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """All modules that are trained in full, in addition to the LoRA."""
        return self.saved + self.also

    def adapted(self, target: TrainingTarget) -> set[str]:
        """Return the weights that PEFT adapts with these settings."""
        modules = peft_rules.adapted_modules(
            target.modules, self.modules, self.layers, self.pattern
        ) & {*target.modules}
        return {f"{name}.weight" for name in modules} | peft_rules.adapted_parameters(
            target.parameters, self.parameters
        )

    def is_exact(self, target: TrainingTarget) -> bool:
        """Return whether these settings select exactly what is to be trained."""
        saved = peft_rules.saved_modules(target.modules, self.modules_to_save)
        wanted = {*_blocked(target), *target.also}
        return self.adapted(target) == _adaptable(target) and saved == wanted


def by_layers(target: TrainingTarget, *, pattern: bool = True) -> Iterator[LoraTarget]:
    """Yield settings with the last component of each module's name, plus the layer indices.

    Args:
        target: The model to train.
        pattern: Whether to set `layers_pattern` too.
    """
    modules, parameters = _parts(target)
    endings = tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    if len(endings) >= peft_rules.SHORTENED_FROM:
        return
    # Not the whole stack: older releases of PEFT require a component before the pattern.
    stacks = [stack.split(".") for stack in target.stacks]
    patterns = [".".join(s[-n:]) for n in range(1, max(map(len, stacks))) for s in stacks]
    for layers_pattern in dict.fromkeys(patterns) if pattern else (None,):
        yield LoraTarget(
            modules=endings,
            layers=target.layers,
            pattern=layers_pattern,
            parameters=_endings(parameters, target),
            saved=_endings(_blocked(target), target),
        )


def by_endings(target: TrainingTarget) -> Iterator[LoraTarget]:
    """Yield settings with an ending of each module's whole name, the shortest endings first."""
    modules, parameters = _parts(target)
    saved = _blocked(target)
    for before in range(max(stack.count(".") for stack in target.stacks) + 1):
        yield LoraTarget(
            modules=_endings(modules, target, before),
            parameters=_endings(parameters, target, before),
            saved=_endings(saved, target, before),
        )


def by_regex(target: TrainingTarget) -> Iterator[LoraTarget]:
    """Yield settings with one regular expression for all modules.

    A model with stacked experts gets none: PEFT searches the expression for their names, and then
    uses only the last components.
    """
    modules, _ = _parts(target)
    if target.experts or not modules:
        return
    kinds = dict.fromkeys(map(inside, modules))
    regex = rf"{_any(target.stacks)}\.{_any(map(str, target.layers))}\.{_any(kinds)}"
    yield LoraTarget(modules=regex, saved=_endings(_blocked(target), target))


def choose(target: TrainingTarget, *forms: Iterator[LoraTarget]) -> LoraTarget:
    """Choose the first settings that select exactly the new layers.

    Raises:
        RefusedError: No form does, or no weight of the new layers can be adapted.
    """
    if not _adaptable(target):
        raise RefusedError(
            "no tensor of the new layers can be adapted by a LoRA",
            hint="train in full, `--for transformers --method full`",
        )
    if target.tied:
        raise RefusedError(
            "the head and the embeddings share one tensor, which modules_to_save would untie",
            hint="train in full, `--for transformers --method full`, or leave out --also",
        )
    for form in forms:
        for lora in form:
            whole = replace(lora, also=target.also)
            if whole.is_exact(target):
                return whole
    raise RefusedError(
        "no LoRA settings select the new layers without selecting others too",
        hint="train in full, `--for transformers --method full`",
    )


def _adaptable(target: TrainingTarget) -> set[str]:
    """Return the weights of the new layers that PEFT can adapt."""
    if target.model_type not in peft_rules.MAMBA_TYPES:
        return {*target.adapted}
    return {n for n in target.adapted if n.split(".")[-2] not in peft_rules.MAMBA_REFUSED}


def _parts(target: TrainingTarget) -> tuple[list[str], list[str]]:
    """Return the adapted modules in the model's order, and the adapted weights that are no modules.

    In a model with stacked experts PEFT treats some module names as experts; the weights of those
    modules are selected as parameters.
    """
    adaptable = _adaptable(target)
    modules = [name for name in target.modules if f"{name}.weight" in adaptable]
    parameters = [name for name in target.parameters if name in adaptable & target.experts]
    if target.experts:
        renamed = [n for n in modules if n.rpartition(".")[2] in peft_rules.EXPERT_NAMES]
        modules = [name for name in modules if name not in renamed]
        parameters += [f"{name}.weight" for name in renamed]
    as_parameters = {name.removesuffix(".weight") for name in parameters}
    return [name for name in modules if name not in as_parameters], parameters


def _blocked(target: TrainingTarget) -> list[str]:
    """Return the modules to train in full: they pass no gradient and cannot be adapted."""
    adaptable = _adaptable(target)
    owners = {name.rpartition(".")[0] for name in target.zeroed}
    parents = {name.rpartition(".")[0] for name in target.modules}
    return [
        name
        for name in target.modules
        if name in owners and name not in parents and not _has(adaptable, name)
    ]


def _has(adaptable: Collection[str], module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in adaptable)


def _endings(
    names: Collection[str], target: TrainingTarget, before: int | None = None
) -> tuple[str, ...]:
    """Shorten names: they then start `before` components ahead of the last one of their stack.

    If `before` is None, names stay whole. Each ending is returned once.
    """
    return tuple(dict.fromkeys(_ending(name, target, before) for name in names))


def _ending(name: str, target: TrainingTarget, before: int | None) -> str:
    if before is None:
        return name
    stack = next(stack for stack in target.stacks if name.startswith(f"{stack}."))
    kept = stack.split(".")[-before - 1 :]
    return ".".join(kept) + name[len(stack) :]


def _any(words: Collection[str] | Iterator[str]) -> str:
    """Return a regular expression that matches any of some words."""
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"
