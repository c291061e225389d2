"""Write ms-swift's command-line arguments for full training or for a LoRA.

ms-swift finds its model type and its template by the model's directory name or class. Several types
or templates may fit a class; ms-swift then stops, or takes the default of its type. `ms_swift.json`
lists what fits; `tools/ms_swift_types.py` derives it from a wheel of ms-swift.

Without `--torch_dtype`, ms-swift loads the weights in the dtype of config.json, and in 16 bits if
that states none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from mergekit_interleave.training import lora_target
from mergekit_interleave.training.settings import (
    TrainerSettings,
    check_selection,
    lora_notes,
    precision_key,
    shell_text,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import FULL, LORA


def trained_parameters(parameters: Iterable[str], prefixes: Collection[str]) -> set[str]:
    """Return the parameters that ms-swift trains by `trainable_parameters`, a list of prefixes."""
    return {name for name in parameters if name.startswith(tuple(prefixes))}


def full(target: TrainingTarget) -> TrainerSettings:
    """Write arguments for full training, with one prefix for each layer in each stack."""
    prefixes = [f"{stack}.{index}." for stack in target.stacks for index in target.layers]
    prefixes += [f"{module}." for module in target.also]
    check_selection(target, trained_parameters(target.parameters, prefixes), "ms-swift")
    text = shell_text(
        {
            **_model(target),
            "--torch_dtype": ["float32"],  # 16 bits are too few for most updates
            **{f"--{key}": ["true"] for key in precision_key(target)},
            "--tuner_type": ["full"],
            "--freeze_parameters_ratio": ["1"],
            "--trainable_parameters": prefixes,
        }
    )
    return TrainerSettings(text, FULL, tuple(_notes(target)))


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write PEFT's settings; a regular expression has a separate option."""
    chosen = lora_target.choose(
        target, lora_target.by_regex(target), lora_target.by_endings(target)
    )
    modules: tuple[str, Sequence[str]] = ("--target_modules", chosen.modules)
    if isinstance(chosen.modules, str):
        modules = ("--target_regex", [chosen.modules])
    text = shell_text(
        {
            **_model(target),
            "--torch_dtype": [target.exact_dtype] if target.exact_dtype else [],
            "--tuner_type": ["lora"],
            modules[0]: modules[1],
            "--target_parameters": chosen.parameters,
            "--modules_to_save": chosen.modules_to_save,
            "--lora_dropout": ["0"] if chosen.parameters else [],
        }
    )
    return TrainerSettings(text, LORA, (*lora_notes(chosen), *_notes(target)))


def fitting(architecture: str | None, model_type: str) -> tuple[str | None, str | None]:
    """Return the model type and the template of ms-swift that a model's type determines.

    Several types of one class differ only in their templates, so the one that is called like the
    model's own type is taken. A template is determined only if all types of the class agree.

    Args:
        architecture: The name of the model's class.
        model_type: Its `model_type` in config.json.
    """
    types = _types(architecture)
    templates = _templates(architecture)
    kind = model_type if model_type in types else next(iter(types), None)
    is_known = model_type in types or len(types) == 1
    return kind if is_known else None, templates[0] if len(templates) == 1 else None


def _types(architecture: str | None) -> Mapping[str, Sequence[str]]:
    classes: Mapping[str, Mapping[str, Sequence[str]]] = _data()["classes"]
    return classes.get(architecture or "", {})


def _templates(architecture: str | None) -> list[str]:
    return list(dict.fromkeys(each for own in _types(architecture).values() for each in own))


@cache
def _data() -> Mapping[str, Any]:
    text = (resources.files(__package__) / "ms_swift.json").read_text(encoding="utf-8")
    data: Mapping[str, Any] = json.loads(text)
    return data


def _model(target: TrainingTarget) -> dict[str, Sequence[str]]:
    kind, template = fitting(target.architecture, target.model_type)
    return {
        "--model": [target.directory],
        "--model_type": [kind] if kind else [],
        "--template": [template] if template else [],
    }


def _notes(target: TrainingTarget) -> Iterator[str]:
    """Yield what to add if the model's type does not determine it."""
    kind, template = fitting(target.architecture, target.model_type)
    types = _types(target.architecture)
    name = f"ms-swift {_data()['release']}"
    one_of = f"for {name} one of {', '.join(_templates(target.architecture))}"
    if not types:
        yield (
            f"{name} has no model type for {target.architecture}: add --template with the chat "
            "format of the base, and --model_type if a later release has one"
        )
    elif kind is None:
        yield (
            f"add --model_type with the type of the base, one of {', '.join(types)}, and "
            f"--template with its chat format, {one_of}"
        )
    elif template is None:
        yield f"add --template with the chat format of the base, {one_of}"
