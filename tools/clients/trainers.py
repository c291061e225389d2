"""Give the settings that `train` prints to PEFT, TRL, LLaMA-Factory and ms-swift."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import zoo

from clients import models
from clients.environment import ClientError, Environment
from clients.row import Row

TRAINERS, FACTORY, SWIFT = (Environment(n) for n in ("trainers", "llamafactory", "ms-swift"))
PEFT, TRL, LLAMA_FACTORY, MS_SWIFT = "PEFT", "TRL", "LLaMA-Factory", "ms-swift"


def peft() -> Iterator[Row]:
    """Run the printed code, and train the LoRA with TRL."""
    yield _trained(PEFT, "peft")


def trl() -> Iterator[Row]:
    """Run the printed code, and train."""
    yield _trained(TRL, "trl")


def _trained(client: str, name: str) -> Row:
    grown = models.grow(models.toy("llama"))
    found = TRAINERS.run(
        "run_trainer.py", name, _settings(grown, name, "full" if name == "trl" else "lora")
    )
    new = models.new_layers(grown)
    right = found == {"trainable": new, "changed": new}
    text = f"layers {new}" if right else f"{found}, not layers {new}"
    compared = "trainable layers, and layers that two steps changed"
    return Row(
        client, TRAINERS.version(name), "printed code, llama toy", compared, text, wrong=not right
    )


def llama_factory() -> Iterator[Row]:
    """Parse the printed settings, load the model, and list the trainable layers."""
    version = FACTORY.version("llamafactory")
    for name, method in (
        ("llama", "full"),
        ("qwen3_moe", "full"),
        ("gpt2", "full"),
        ("llama", "lora"),
    ):
        grown = models.grow(models.toy(name), models.EVERY, "--legacy-config")
        found = FACTORY.run("run_llamafactory.py", _settings(grown, "llamafactory", method))
        right = found["trainable"] == models.new_layers(grown)
        text = f"layers {found['trainable']}{'' if right else ', which are not the new ones'}"
        ran = f"parser and `load_model`, {method}, {name} toy"
        yield Row(LLAMA_FACTORY, version, ran, "trainable layers", text, wrong=not right)


def ms_swift() -> Iterator[Row]:
    """Parse the printed arguments, with the template that the notes ask for."""
    version, grown = SWIFT.version("ms_swift"), models.grow(models.toy("llama"))
    for method in ("full", "lora"):
        ran, compared = f"parser, {method}, llama toy", "that it accepts them"
        new = models.new_layers(grown) if method == "full" else []
        compared += ", `trainable_parameters`" if new else ""
        file = _settings(grown, "ms-swift", method)
        added = "" if "--template" in file.read_text(encoding="utf-8") else ", `--template` added"
        try:
            found = SWIFT.run("run_ms_swift.py", file, "llama")
        except ClientError as error:
            yield Row(MS_SWIFT, version, ran, compared, str(error), wrong=True)
            continue
        text = f"accepted, as model_type {found['model_type']}, template {found['template']}{added}"
        text += f", layers {found['trainable']}" if new or found["trainable"] else ""
        wrong = bool(found["left"]) or found["trainable"] != new
        yield Row(MS_SWIFT, version, ran, compared, text, wrong=wrong)


def _settings(model: Path, trainer: str, method: str) -> Path:
    """Write what `train` prints into a file."""
    status, err, out = zoo.mk_out("train", str(model), "--for", trainer, "--method", method)
    if status:
        raise ClientError(next(line for line in err.splitlines() if line.startswith("error")))
    file = models.FOLDER / f"{model.name}-{trainer}-{method}.txt"
    file.write_text(out, encoding="utf-8")
    return file
