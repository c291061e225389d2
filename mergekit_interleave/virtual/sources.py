"""Load source models with transformers, or check a model that is loaded already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import hub, layer_names, meta_model
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.quantization import KEY
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, DirectiveError, RefusedError
from mergekit_interleave.virtual import quantized_modules
from mergekit_interleave.virtual.memory_names import memory_names


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
        DirectiveError: It does not know where it came from, or that directory is not there.
    """
    name = str(base.name_or_path)
    if not name or not _is_place(name):
        where = f"was loaded from {name}, which is not here now" if name else _UNRECORDED
        raise DirectiveError(
            f"base {where}", hint="name the directory of its checkpoint with `model`"
        )
    return name


_UNRECORDED = "does not record where it was loaded from"


def _is_place(name: str) -> bool:
    """Whether a name can be a directory or a Hub id. A bare name is one only in the Hub's cache."""
    if not name:
        return False
    if Path(name).is_dir() or ("/" in name and hub.is_hub_id(name)):
        return True
    try:
        return hub.is_hub_id(name) and hub.fetch_config(ModelPath(name), cached_only=True).is_dir()
    except CheckpointError:
        return False


def source_of(base: Any, known: Mapping[ModelRef, Checkpoint]) -> Checkpoint:
    """Return the checkpoint that a loaded model came from.

    Args:
        base: The loaded model.
        known: The checkpoints that a directive names.

    Raises:
        DirectiveError: It came from another one, or is not as it was loaded.
        RefusedError: Its layers cannot be shared.
    """
    name = str(base.name_or_path)
    only = next(iter(known.values())) if len(known) == 1 and not _is_place(name) else None
    checkpoint = only or _recorded_by(name, known)
    check_source(base, checkpoint)
    _check_unchanged(base, checkpoint)
    return checkpoint


def _check_unchanged(base: Any, checkpoint: Checkpoint) -> None:
    """Check that a loaded model computes what its checkpoint says, so that a grown one does.

    Raises:
        DirectiveError: Its class, a setting or a module is another.
    """
    with meta_model.transformers_errors("load the model", checkpoint.ref):
        config = meta_model.config_of(checkpoint.path, trusted=checkpoint.trusted)
        stated = meta_model.class_of(config, trusted=checkpoint.trusted).__name__
    if type(base).__name__ != stated:
        raise DirectiveError(
            f"base is a {type(base).__name__}, but the class of {checkpoint.ref} is {stated}",
            hint=f"load it with transformers.{stated}.from_pretrained",
        )
    found, expected = (dict(_settings(each.to_dict())) for each in (base.config, config))
    changed = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if changed:
        key = changed[0]
        raise DirectiveError(
            f"base has {key} {found.get(key)!r:.60}, but config.json of {checkpoint.ref} has "
            f"{expected.get(key)!r:.60}",
            hint="load the base as it is stored, or change its config.json",
        )
    if quantized_modules.is_quantized(base):  # `state_dict` would repack its weights, with errors
        return
    known = memory_names(base, checkpoint.tensors)
    stored = {name for names in known.values() for name in names.names}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    shared = {id(parameters[name]) for name in stored if name in parameters}
    own = [name for name, each in parameters.items() if id(each) not in shared]
    if own:
        raise DirectiveError(
            f"{checkpoint.ref} stores nothing for {own[0]} of base",
            hint="pass the model as it was loaded, with its own modules",
        )


def _settings(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config that change what a model computes, by dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping) and str(key).endswith("_config") and key != KEY:
            yield from _settings(value, f"{within}{key}.")
        elif key not in _OF_LOADING and not str(key).startswith("_"):
            yield f"{within}{key}", value


_OF_LOADING = frozenset(
    {
        KEY, "dtype", "architectures", "transformers_version", "use_cache", "return_dict",
        "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id",
        "pad_token_id", "sep_token_id", "id2label", "label2id", "num_labels", "problem_type",
        "name_or_path", "experts_implementation", "attn_implementation",
    }
)  # fmt: skip
"""Settings that differ between ways to load and call the same model."""


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
        where = "has no weights in memory" if devices == {"meta"} else "lies on several devices"
        raise RefusedError(
            f"{checkpoint.ref}: the loaded model {where}, and a layer can be shared only on one",
            hint='load it with device_map={"": "cpu"} or another single device',
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    try:
        layer_names.stacks_of(names, checkpoint.depth, checkpoint.config)
    except RefusedError as error:
        raise DirectiveError(
            f"the loaded model does not have the {checkpoint.depth} layers of {checkpoint.ref}",
            hint="pass the model as it was loaded, with all its layers",
        ) from error


def _is_dispatched(model: Any) -> bool:
    """Whether accelerate moves inputs or weights of single modules."""
    return len({str(device) for device in getattr(model, "hf_device_map", {}).values()}) > 1
