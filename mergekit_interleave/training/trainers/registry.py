"""List the trainers that `train` knows, one row each.

A row names the module of a trainer. The command line reads this list at every start, so that module
is imported only when settings are written.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

from mergekit_interleave.errors import DirectiveError, RefusedError, nearest

if TYPE_CHECKING:
    from mergekit_interleave.training.settings import TrainerSettings
    from mergekit_interleave.training.target import TrainingTarget

    Writer = Callable[[TrainingTarget], TrainerSettings]

FULL, LORA = METHODS = ("full", "lora")


class Trainer(NamedTuple):
    """A trainer and its capabilities.

    Attributes:
        name: Its name on the command line.
        title: Its name in messages.
        methods: The methods by which it can train only certain layers, the preferred one first.
        module: The module that writes its settings, with one function per method. A leading dot
            stands for this package.
        refusal: Why a method is missing.
        instead: What to use if a method is missing.
    """

    name: str
    title: str
    methods: tuple[str, ...] = METHODS
    module: str = ""
    refusal: str = ""
    instead: str | None = None

    def writer(self, method: str) -> Writer:
        """Return the function that writes the settings for one of its methods."""
        return cast("Writer", getattr(import_module(self.module, __package__), method))


_NO_SETTING = "it has no setting to train only certain layers, with either method"

_ROWS = (
    Trainer(
        "transformers",
        "transformers",
        (FULL,),
        ".transformers",
        refusal="it has no LoRA of its own",
        instead="--for peft",
    ),
    Trainer("trl", "TRL", METHODS, ".trl"),
    Trainer(
        "peft",
        "PEFT",
        (LORA,),
        ".peft",
        refusal="it trains adapters, not layers",
        instead="--for transformers",
    ),
    Trainer("llamafactory", "LLaMA-Factory", METHODS, ".llamafactory"),
    Trainer("axolotl", "axolotl", METHODS, ".axolotl"),
    Trainer("ms-swift", "ms-swift", METHODS, ".ms_swift"),
    Trainer(
        "unsloth",
        "unsloth",
        (LORA,),
        ".unsloth",
        refusal="it does not support full training of certain layers only",
        instead="--for transformers, or --method lora",
    ),
    Trainer("torchtune", "torchtune", (), refusal=_NO_SETTING),
    Trainer("litgpt", "LitGPT", (), refusal=_NO_SETTING),
)

TRAINERS = {trainer.name: trainer for trainer in _ROWS}
"""The trainers by their names on the command line, in the order in which help lists them; and
those that cannot train only certain layers, so that `find` can say so."""


def usable() -> list[str]:
    """Return the names of the trainers that can train only certain layers."""
    return [name for name, trainer in TRAINERS.items() if trainer.methods]


def find(name: str, method: str | None = None) -> Trainer:
    """Find a trainer, and check that it can train only certain layers.

    Args:
        name: The trainer's name on the command line.
        method: `full`, `lora`, or None for the trainer's preferred method.

    Raises:
        DirectiveError: There is no such trainer or method.
        RefusedError: The trainer cannot train only certain layers with this method.
    """
    trainer = TRAINERS.get(name)
    if trainer is None:
        close = nearest(name, TRAINERS)
        hint = f"did you mean {close}?" if close else f"use {_others()}"
        raise DirectiveError(f"unknown trainer {name!r}", hint=hint)
    if method not in (None, *METHODS):
        raise DirectiveError(f"unknown method {method!r}", hint=f"use {' or '.join(METHODS)}")
    if not trainer.methods:
        raise RefusedError(f"{trainer.title}: {trainer.refusal}", hint=_others())
    if method not in (None, *trainer.methods):
        raise RefusedError(f"{trainer.title}: {trainer.refusal}", hint=trainer.instead)
    return trainer


def in_words() -> str:
    """Return the names of the usable trainers as a list within a sentence."""
    names = usable()
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _others() -> str:
    return f"--for {in_words()}"
