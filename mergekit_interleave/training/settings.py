"""Define the settings that make a trainer train exactly the new layers, and check them.

Every trainer selects parameters by their names. Before settings are returned, the trainer's own
rule is applied to the names of the model's parameters. Settings that do not select exactly the new
layers are rejected.
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
    """The settings that tell a trainer which layers to train.

    Attributes:
        text: The settings as YAML, command-line arguments or Python, as the trainer expects them.
        method: How they train the new layers: `full` or `lora`.
        notes: Facts to know before using them, one sentence each.
        warnings: Problems in the files that were read, one sentence each.
        trainer: The trainer's name on the command line.
    """

    text: str
    method: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    trainer: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, as `train --json` prints them."""
        return {name: [*v] if isinstance(v, tuple) else v for name, v in asdict(self).items()}


# Helpers for the modules in `trainers`.


def check_selection(target: TrainingTarget, selected: set[str], title: str) -> None:
    """Check that a trainer's settings select the parameters of the new layers and no others.

    Args:
        target: The model to train.
        selected: The parameters that the trainer's rule selects.
        title: The trainer's name in messages.

    Raises:
        RefusedError: The settings select other parameters.
    """
    if selected != target.trained:
        wrong = min(selected ^ target.trained)
        what = "would also train" if wrong in selected else "would not train"
        raise RefusedError(f"{title} {what} {wrong}")


def yaml_text(content: Mapping[str, object]) -> str:
    """Write settings as YAML, without empty ones."""
    return yaml_io.write({key: value for key, value in content.items() if value not in (None, [])})


def model_keys(target: TrainingTarget, key: str) -> dict[str, object]:
    """Return the YAML keys that name the model and, if it has custom code, allow that code."""
    return {key: target.directory, "trust_remote_code": target.has_remote_code or None}


def precision_key(target: TrainingTarget) -> dict[str, object]:
    """Return the key by which a trainer computes in 16 bits while the trained weights have 32.

    It is the dtype of the weights, so that those that are not trained do not change.
    """
    key = {"bfloat16": "bf16", "float16": "fp16"}.get(target.half_dtype or "")
    return {key: True} if key and target.loads_too_coarse else {}


def shell_text(options: Mapping[str, Sequence[str]]) -> str:
    """Write options as command-line arguments, without empty ones."""
    lines = [f"{flag} {shlex.join(words)}" for flag, words in options.items() if words]
    return " \\\n".join(lines) + "\n"


def load_line(target: TrainingTarget) -> str:
    """Return the line of Python that loads the model."""
    dtype = ', dtype="float32"' if target.loads_too_coarse else ""
    code = ", trust_remote_code=True" if target.has_remote_code else ""
    name = python_literal(target.directory)
    return f"model = {target.task.load}.from_pretrained({name}{dtype}{code})\n"


def lora_arguments(lora: LoraTarget) -> str:
    """Write the settings of PEFT as Python arguments."""
    arguments = {
        "target_modules": lora.modules,
        "layers_to_transform": lora.layers,
        "layers_pattern": lora.pattern,
        "target_parameters": lora.parameters,
        "modules_to_save": lora.modules_to_save,
        "lora_dropout": dropout(lora),
    }
    return "".join(
        f"    {key}={python_value(value)},\n"
        for key, value in arguments.items()
        if value not in (None, ())
    )


def dropout(lora: LoraTarget) -> float | None:
    """Return the `lora_dropout` that PEFT requires if it adapts parameters."""
    return 0.0 if lora.parameters else None


def lora_notes(lora: LoraTarget) -> Iterator[str]:
    """Yield the facts to know about a LoRA before training it."""
    if lora.saved:
        yield (
            f"{lora.saved[0]} and similar modules are zero and cannot be adapted by a LoRA; they "
            "are trained in full, because the LoRA would get no gradient otherwise"
        )
    if lora.parameters:
        yield (
            "experts are named as in transformers 5, where one parameter holds all of them; "
            "transformers 4 has one module per expert, which these settings do not match"
        )


def python_value(value: object) -> str:
    """Write a value as Python source; a long tuple becomes a list on several lines."""
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
    """Write a string, a number or a list as Python source.

    Characters are not escaped: JSON's escapes for those beyond U+FFFF are not Python's.
    """
    return json.dumps(value, ensure_ascii=False)


_WIDTH = 76
