"""Settings that make a trainer train exactly the new layers.

Every trainer chooses parameters by their names. Before settings are returned, the trainer's own
rule is applied to the model's names: settings that would not select exactly the new layers are
refused.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_interleave.directive import yaml_io
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.training.lora_target import LoraTarget
from mergekit_interleave.training.target import TrainingTarget


@dataclass(frozen=True)
class TrainerSettings:
    """What to tell a trainer.

    Attributes:
        text: The settings: YAML, command-line arguments or Python, as the trainer takes them.
        method: How they train the new layers: `full` or `lora`.
        notes: What to know before using them.
        warnings: What is wrong with the files that were read.
        trainer: The trainer's name on the command line.
    """

    text: str
    method: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    trainer: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values, as `train --json` prints them."""
        return {name: [*v] if isinstance(v, tuple) else v for name, v in asdict(self).items()}


# Helpers for the modules in `trainers`.


def check_selection(target: TrainingTarget, selected: set[str], title: str) -> None:
    """Check that a trainer's settings select the parameters of the new layers and no others.

    Args:
        target: The model to train.
        selected: The parameters that the trainer's rule selects.
        title: The trainer's name in messages.

    Raises:
        RefusedError: They do not.
    """
    if selected != target.trained:
        odd = min(selected ^ target.trained)
        what = "would also train" if odd in selected else "would not train"
        raise RefusedError(f"{title} {what} {odd}")


def yaml_text(content: Mapping[str, object]) -> str:
    """Settings as YAML, without the empty ones."""
    return yaml_io.write({key: value for key, value in content.items() if value not in (None, [])})


def model_keys(target: TrainingTarget, key: str) -> dict[str, object]:
    """The YAML keys that name the model; code of the model's own runs only where allowed."""
    return {key: target.directory, "trust_remote_code": target.has_remote_code or None}


def shell_text(options: Mapping[str, Sequence[str]]) -> str:
    """Options as command-line arguments, without the empty ones."""
    lines = [f"{flag} {shlex.join(words)}" for flag, words in options.items() if words]
    return " \\\n".join(lines) + "\n"


def load_line(target: TrainingTarget) -> str:
    """The line of Python that loads the model."""
    code = ", trust_remote_code=True" if target.has_remote_code else ""
    name = python_literal(target.directory)
    return f"model = {target.task.load}.from_pretrained({name}{code})\n"


def lora_arguments(lora: LoraTarget) -> str:
    """The settings of PEFT as Python arguments."""
    arguments = {
        "target_modules": lora.modules,
        "layers_to_transform": lora.layers,
        "layers_pattern": lora.pattern,
        "target_parameters": lora.parameters,
        "modules_to_save": lora.saved,
        "lora_dropout": dropout(lora),
    }
    return "".join(
        f"    {key}={python_value(value)},\n"
        for key, value in arguments.items()
        if value not in (None, ())
    )


def dropout(lora: LoraTarget) -> float | None:
    """The `lora_dropout` that PEFT requires where it adapts parameters."""
    return 0.0 if lora.parameters else None


def lora_notes(lora: LoraTarget) -> Iterator[str]:
    """What to know about a LoRA before training it."""
    if lora.saved:
        yield (
            f"{lora.saved[0]} and similar modules are zero and cannot have a LoRA; they are "
            "trained in full, because the LoRA would get no gradient otherwise"
        )
    if lora.parameters:
        yield (
            "experts are named as in transformers 5, where one parameter holds all of them; "
            "transformers 4 has one module per expert, which these settings do not reach"
        )


def python_value(value: object) -> str:
    """A value as Python source; a long tuple becomes a list on several lines."""
    if not isinstance(value, tuple):
        return python_literal(value)
    words = [python_literal(item) for item in value]
    line = f"[{', '.join(words)}]"
    if len(line) <= _WIDTH:
        return line
    inner = textwrap.fill(
        ", ".join(words),
        _WIDTH,
        initial_indent=" " * 8,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"[\n{inner},\n    ]"


def python_literal(value: object) -> str:
    """A string, a number or a list as Python source.

    Letters stay as they are: JSON's escapes for letters beyond U+FFFF are not Python's.
    """
    return json.dumps(value, ensure_ascii=False)


_WIDTH = 76
