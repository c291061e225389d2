"""Load source models with transformers, or check a model that is loaded already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import layer_names, meta_model
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import DirectiveError, RefusedError
from mergekit_interleave.virtual import quantized_modules


def load_source(checkpoint: Checkpoint, dtype: str, device_map: Any, like: Any = None) -> Any:
    """Load a source model with the class that its config.json names.

    Args:
        checkpoint: The model.
        dtype: The name of a dtype of torch.
        device_map: See `PreTrainedModel.from_pretrained`.
        like: A loaded model; if transformers quantized it on loading, so is this one.

    Raises:
        RefusedError: transformers cannot load it.
    """
    with meta_model.transformers_errors("load the model", checkpoint.ref):
        config = meta_model.config_of(checkpoint.path, trusted=checkpoint.trusted)
        own_class = meta_model.class_of(config, trusted=checkpoint.trusted)
        model = own_class.from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantized_modules.settings_on_loading(like),
        )
    check_source(model, checkpoint)
    return model


def check_model(base: Any) -> None:
    """Check that something is a loaded model of transformers.

    Raises:
        DirectiveError: It is not.
        RefusedError: It has adapters.
    """
    from transformers import PreTrainedModel  # noqa: PLC0415 - takes seconds to import

    if hasattr(base, "peft_config") or getattr(base, "_hf_peft_config_loaded", False):
        raise RefusedError(
            "base has adapters, which belong to single layers",
            hint="call merge_and_unload() of PEFT first",
        )
    if not isinstance(base, PreTrainedModel):
        raise DirectiveError(
            f"base is {base!r:.60}, not a model of transformers",
            hint="pass what AutoModelForCausalLM.from_pretrained returns",
        )


def place_of(base: Any) -> str:
    """Return the directory or Hub id that a loaded model came from.

    Raises:
        DirectiveError: It does not know where it came from.
    """
    if not base.name_or_path:
        raise DirectiveError(
            "base does not record where it was loaded from",
            hint="name the directory of its checkpoint with `model`",
        )
    return str(base.name_or_path)


def source_of(base: Any, known: Mapping[ModelRef, Checkpoint]) -> Checkpoint:
    """Return the checkpoint that a loaded model came from.

    Args:
        base: The loaded model.
        known: The checkpoints that a directive names.

    Raises:
        DirectiveError: It came from another one.
        RefusedError: Its layers cannot be shared.
    """
    only = next(iter(known.values())) if len(known) == 1 and not base.name_or_path else None
    checkpoint = only or _recorded_by(place_of(base), known)
    check_source(base, checkpoint)
    return checkpoint


def _recorded_by(name: str, known: Mapping[ModelRef, Checkpoint]) -> Checkpoint:
    """Return the checkpoint that a loaded model records."""
    for ref, checkpoint in known.items():
        places = {Path(place).resolve() for place in (checkpoint.path, checkpoint.store)}
        if name == ref.path or Path(name).resolve() in places:
            return checkpoint
    raise DirectiveError(
        f"base was loaded from {name}, but the directive names {', '.join(map(str, known))}",
        hint="leave `model` out of the directive, or leave `base` out",
    )


def check_source(model: Any, checkpoint: Checkpoint) -> None:
    """Check that layers of a loaded model can be shared.

    Raises:
        RefusedError: It lies on several devices.
        DirectiveError: It has another number of layers than its checkpoint.
    """
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or "meta" in devices or _is_dispatched(model):
        raise RefusedError(
            f"{checkpoint.ref}: the loaded model lies on several devices or is offloaded, and a "
            "layer can be shared only on one",
            hint='load it with device_map={"": "cpu"} or another single device',
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    try:
        layer_names.stacks_of(names, checkpoint.depth, checkpoint.config)
    except RefusedError as error:
        raise DirectiveError(
            f"the loaded model has not the {checkpoint.depth} layers of {checkpoint.ref}",
            hint="pass the model as it was loaded, with all its layers",
        ) from error


def _is_dispatched(model: Any) -> bool:
    """Whether accelerate moves inputs or weights of single modules."""
    return len({str(device) for device in getattr(model, "hf_device_map", {}).values()}) > 1
