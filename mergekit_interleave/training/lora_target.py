"""How a LoRA of the new layers is said, so that it adapts them all and nothing else. Pure.

There are several ways to say it, and none serves every model: the first that selects exactly the
new layers is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mergekit_interleave.checkpoint.layer_names import inside
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.training import selectors
from mergekit_interleave.training.target import Trainee


@dataclass(frozen=True)
class Lora:
    """The words of PEFT that choose what is adapted; other trainers hand them on.

    Attributes:
        modules: `target_modules`, a list of endings or one regular expression.
        layers: `layers_to_transform`, where the endings alone are those of all layers.
        pattern: `layers_pattern`.
        parameters: `target_parameters`: what is no module of its own.
        saved: `modules_to_save`: what is trained in full besides.
    """

    modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    pattern: str | None = None
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()

    def adapted(self, trainee: Trainee) -> set[str]:
        """The weights that PEFT adapts by these words."""
        modules = selectors.peft_modules(
            trainee.modules, self.modules, self.layers, self.pattern
        ) & {*trainee.modules}
        return {f"{name}.weight" for name in modules} | selectors.peft_parameters(
            trainee.parameters, self.parameters
        )

    def is_exact(self, trainee: Trainee) -> bool:
        """Whether these words say the new layers, no more and no less."""
        saved = selectors.peft_saved(trainee.modules, self.saved)
        return self.adapted(trainee) == _adaptable(trainee) and saved == {*_unreached(trainee)}


def by_layers(trainee: Trainee, *, pattern: bool = True) -> Iterator[Lora]:
    """The last words of the modules' names, and the layers beside them.

    Args:
        trainee: What is to be trained.
        pattern: Whether what stands before the index is said.
    """
    modules, parameters = _parts(trainee)
    words = tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    if len(words) >= selectors.PEFT_CONDENSED:
        return
    # Not the whole stack: older releases of PEFT want a word before the pattern.
    stacks = [stack.split(".") for stack in trainee.stacks]
    patterns = [".".join(s[-n:]) for n in range(1, max(map(len, stacks))) for s in stacks]
    for before in dict.fromkeys(patterns) if pattern else (None,):
        yield Lora(
            modules=words,
            layers=trainee.new,
            pattern=before,
            parameters=_endings(parameters, trainee),
            saved=_endings(_unreached(trainee), trainee),
        )


def by_endings(trainee: Trainee) -> Iterator[Lora]:
    """Every module by its name, as short as it can be."""
    modules, parameters = _parts(trainee)
    saved = _unreached(trainee)
    for words in range(max(stack.count(".") for stack in trainee.stacks) + 1):
        yield Lora(
            modules=_endings(modules, trainee, words),
            parameters=_endings(parameters, trainee, words),
            saved=_endings(saved, trainee, words),
        )


def by_regex(trainee: Trainee) -> Iterator[Lora]:
    """One regular expression for all of them.

    Not for a model that has stacked experts: PEFT looks for their names in it, and then takes the
    last words alone.
    """
    modules, _ = _parts(trainee)
    if trainee.stacked or not modules:
        return
    kinds = dict.fromkeys(map(inside, modules))
    regex = rf"{_any(trainee.stacks)}\.{_any(map(str, trainee.new))}\.{_any(kinds)}"
    yield Lora(modules=regex, saved=_endings(_unreached(trainee), trainee))


def choose(trainee: Trainee, *ways: Iterator[Lora]) -> Lora:
    """The first of some ways that says exactly the new layers.

    Raises:
        RefusedError: None does, or nothing of the new layers can be adapted.
    """
    if not _adaptable(trainee):
        raise RefusedError("no tensor of the new layers can have a LoRA", hint="--method full")
    for way in ways:
        for lora in way:
            if lora.is_exact(trainee):
                return lora
    raise RefusedError(
        "there are no words for a LoRA of the new layers that would not select others, too",
        hint="--method full",
    )


def _adaptable(trainee: Trainee) -> set[str]:
    """The weights of the new layers that PEFT adapts."""
    if trainee.model_type not in selectors.PEFT_MAMBA:
        return {*trainee.adapted}
    return {n for n in trainee.adapted if n.split(".")[-2] not in selectors.PEFT_NO_MAMBA}


def _parts(trainee: Trainee) -> tuple[list[str], list[str]]:
    """What is adapted: modules, in the model's order, and parameters that are none.

    In a model with stacked experts PEFT takes some names for the experts'; the weights of those
    modules are chosen as parameters.
    """
    adaptable = _adaptable(trainee)
    modules = [name for name in trainee.modules if f"{name}.weight" in adaptable]
    parameters = [name for name in trainee.parameters if name in adaptable & trainee.stacked]
    if trainee.stacked:
        renamed = [n for n in modules if n.rpartition(".")[2] in selectors.PEFT_RENAMED]
        modules = [name for name in modules if name not in renamed]
        parameters += [f"{name}.weight" for name in renamed]
    own = {name.removesuffix(".weight") for name in parameters}
    return [name for name in modules if name not in own], parameters


def _unreached(trainee: Trainee) -> list[str]:
    """The modules that let nothing pass and can have no LoRA, so that they are trained in full."""
    adaptable = _adaptable(trainee)
    owners = {name.rpartition(".")[0] for name in trainee.closed}
    parents = {name.rpartition(".")[0] for name in trainee.modules}
    return [
        name
        for name in trainee.modules
        if name in owners and name not in parents and not _has(adaptable, name)
    ]


def _has(adaptable: Collection[str], module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in adaptable)


def _endings(names: Collection[str], trainee: Trainee, words: int | None = None) -> tuple[str, ...]:
    """Names without the first words of their stack; in full where that many are not given."""
    return tuple(dict.fromkeys(_ending(name, trainee, words) for name in names))


def _ending(name: str, trainee: Trainee, words: int | None) -> str:
    if words is None:
        return name
    stack = next(stack for stack in trainee.stacks if name.startswith(f"{stack}."))
    kept = stack.split(".")[-words - 1 :]
    return ".".join(kept) + name[len(stack) :]


def _any(words: Collection[str] | Iterator[str]) -> str:
    """A regular expression for one of some words."""
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"
