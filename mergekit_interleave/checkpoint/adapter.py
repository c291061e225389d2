"""Recognize a PEFT adapter: a LoRA, which a model is merged with, in place of a model."""

from __future__ import annotations

from pathlib import Path

from mergekit_interleave.checkpoint import hub
from mergekit_interleave.checkpoint.safetensors_header import read_json
from mergekit_interleave.directive.model_ref import ModelPath, is_directory_or_file
from mergekit_interleave.errors import CheckpointError

CONFIG = "adapter_config.json"
"""The file by which transformers recognizes a PEFT adapter, and loads it with a model."""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds the config of a PEFT adapter."""
    return (directory / CONFIG).is_file()


def check_merged(directory: Path) -> None:
    """Check that a directory is not that of a LoRA that a trainer wrote.

    Args:
        directory: A directory that must hold a trained model.

    Raises:
        CheckpointError: It holds an adapter, and no config.json.
    """
    if is_adapter(directory) and not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: is a PEFT adapter, not a model",
            hint="merge it in Python, with AutoPeftModelForCausalLM of peft, and name the result: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).merge_and_unload()"
            ".save_pretrained('merged')",
        )


def not_a_model(directory: Path) -> CheckpointError:
    """Return the error for an adapter that is named as a model."""
    try:
        base = read_json(directory / CONFIG).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    return CheckpointError(
        f"{directory}: is a PEFT adapter, not a model",
        hint=f"merge it into its base while growing: --model {base or 'BASE'}+{directory}",
    )


def check(adapter: ModelPath, *, cached_only: bool, cache_dir: str | None = None) -> None:
    """Check that an adapter exists. From the Hub, only its config is fetched.

    Args:
        adapter: A directory or a Hub id.
        cached_only: Do not access the network.
        cache_dir: A Hub cache to use instead of the default one.

    Raises:
        CheckpointError: There is no such adapter.
    """
    path = Path(adapter.path)
    if is_directory_or_file(adapter.path):
        if not is_adapter(path):
            raise CheckpointError(f"{path}: not a PEFT adapter, because it has no {CONFIG}")
    elif hub.is_hub_id(adapter.path):
        hub.fetch_config(adapter, name=CONFIG, cached_only=cached_only, cache_dir=cache_dir)
    else:
        raise CheckpointError(
            f"{path}: no such directory in {Path.cwd()}, so no LoRA can be read from it"
        )
