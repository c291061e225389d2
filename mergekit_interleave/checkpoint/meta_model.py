"""Build the model of a config.json on the meta device, which allocates no memory for weights.

This shows which tensors the class expects, their shapes, and which of them are tied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_interleave import _requirements
from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.checkpoint.quantization import KEY as QUANTIZATION
from mergekit_interleave.checkpoint.safetensors_header import read_json
from mergekit_interleave.errors import InterleaveError, OutOfMemoryError, RefusedError


def shapes(path: Path, *, trusted: bool = False) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the class of a config.json has in memory.

    Args:
        path: The directory that holds the config.json.
        trusted: Whether the model's own code may be run.

    Raises:
        RefusedError: transformers cannot build the model.
    """
    return {name: tuple(tensor.shape) for name, tensor in _state(path, trusted=trusted).items()}


def parameters(base: Checkpoint) -> tuple[int, list[int]]:
    """Count the parameters of the model class: those outside the layers, and those in each layer.

    Raises:
        RefusedError: transformers cannot build the model, or builds another number of layers.
    """
    state = {
        id(tensor): (name, tensor)
        for name, tensor in _state(base.path, trusted=base.trusted).items()
    }
    sizes = {name: int(tensor.numel()) for name, tensor in state.values()}
    stacks = layer_names.by_stack(sizes).values()
    whole = [stack for stack in stacks if stack.keys() == {*range(base.depth)}]
    if not whole:
        raise RefusedError(
            f"{base.ref}: transformers does not build {base.depth} layers from its config.json"
        )
    per_layer = [sum(sum(stack[index].values()) for stack in whole) for index in range(base.depth)]
    return sum(sizes.values()) - sum(per_layer), per_layer


def ties(path: Path, *, trusted: bool = False) -> Mapping[str, frozenset[str]]:
    """Return the tensors that the class has in memory, each with the others that it is tied to.

    transformers saves only one tensor of each tied group. For the arguments, see `shapes`.

    Raises:
        RefusedError: transformers cannot build the model.
    """
    state = _state(path, trusted=trusted)
    same: dict[int, set[str]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), set()).add(name)
    return {name: frozenset(same[id(tensor)] - {name}) for name, tensor in state.items()}


def _state(path: Path, *, trusted: bool) -> Mapping[str, Any]:
    return dict(build(path, trusted=trusted).state_dict(keep_vars=True))


def build(path: Path, *, trusted: bool = False) -> Any:
    """Build the model of a config.json with its class on the meta device.

    For the arguments, see `shapes`.

    Raises:
        RefusedError: transformers cannot build the model.
        RequirementError: transformers is missing or too old.
    """
    with transformers_errors("build the model"):
        config = config_of(path, trusted=trusted)
        return instantiate(config, trusted=trusted)


def config_of(path: Path, *, trusted: bool) -> Any:
    """Load a config.json with its class, without kernels that are not part of transformers.

    For the arguments, see `shapes`.
    """
    import transformers  # noqa: PLC0415 - takes seconds

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trusted)
    leave_out_kernels(config)
    return config


OWN_KERNELS = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""The kernels that transformers itself contains. It would download others, and run their code."""


def leave_out_kernels(config: Any) -> None:
    """Let a config select no kernels that are not part of transformers."""
    for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
        if getattr(config, key, None) not in OWN_KERNELS:
            setattr(config, key, None)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            leave_out_kernels(part)


def instantiate(config: Any, *, trusted: bool) -> Any:
    """Build the model of a loaded config with its class on the meta device."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    named = named_class(config)
    with torch.device("meta"):
        if named is not None:
            return named._from_config(config)  # noqa: SLF001 - there is no public method
        make = transformers.AutoModelForCausalLM.from_config
        return make(config, trust_remote_code=trusted)


def class_of(config: Any, *, trusted: bool) -> Any:
    """Return the class that loads the model of a loaded config; for the arguments, see `shapes`."""
    return named_class(config) or type(instantiate(config, trusted=trusted))


def named_class(config: Any) -> Any:
    """Return the class of transformers that a config names, or None."""
    import transformers  # noqa: PLC0415

    return getattr(transformers, (config.architectures or [""])[0], None)


def unquantized(config: Any) -> Any:
    """Remove the quantization from a loaded config, and return it."""
    for part in (config, config.get_text_config()):
        if hasattr(part, QUANTIZATION):
            delattr(part, QUANTIZATION)
    return config


def hide_bars() -> None:
    """Hide the progress bars of transformers; the commands restore them."""
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Report that memory is exhausted as OutOfMemoryError.

    Raises:
        OutOfMemoryError: It is exhausted.
    """
    try:
        yield
    except InterleaveError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "memory" in str(error).lower()):
            raise
        raise OutOfMemoryError(
            f"out of memory: {' '.join(str(error).split())[:200]}",
            hint="use a smaller dtype, such as dtype='bfloat16', or a smaller model",
        ) from error


@contextmanager
def transformers_errors(task: str, model: object = "") -> Iterator[None]:
    """Report any error of transformers as RefusedError.

    Args:
        task: What transformers is asked to do, as a verb with its object.
        model: The model to name in the error.

    Raises:
        RefusedError: transformers cannot do it.
        RequirementError: transformers is missing or too old.
    """
    _requirements.check("torch", "transformers")
    try:
        with memory_errors():
            yield
    except InterleaveError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        where = f"{model}: " if model else ""
        raise RefusedError(
            f"{where}transformers cannot {task}: {reason.partition('. ')[0][:300]}",
            hint="pass --trust-remote-code to run the model's own code"
            if "trust_remote_code" in reason
            else None,
        ) from error


def has_class(path: Path, *, trusted: bool = False) -> bool:
    """Whether a config.json names a class that can be built without code that is not trusted.

    For the arguments, see `shapes`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: PLC0415

    config = read_json(path / CONFIG)
    return config.get("model_type") in CONFIG_MAPPING_NAMES or (trusted and "auto_map" in config)


def stored_names(model: Any) -> Mapping[str, str]:
    """Map the name of each parameter in memory to its name in a checkpoint.

    A parameter that is stored in parts gets the name of its first part, with `*` in place of the
    number of an expert.

    Args:
        model: A model from `build`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import WeightConverter  # noqa: PLC0415

    # Like `save_pretrained`, undo the conversions in reverse order.
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    undo = [conversion.reverse_transform() for conversion in reversed(conversions)]
    converters = [conversion for conversion in undo if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in undo if not isinstance(conversion, WeightConverter)]
    return {
        name: _undone(name, converters, renamings)
        for name, _ in model.named_parameters(remove_duplicate=False)
    }


def _undone(name: str, converters: Collection[Any], renamings: Collection[Any]) -> str:
    for converter in converters:
        name, found = converter.rename_source_key(name)
        if found is not None:
            break
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
