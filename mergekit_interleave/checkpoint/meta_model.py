"""Build the model of a config.json without memory, as the class that loads it does.

This tells which tensors the class expects, their shapes, and which of them are tied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.errors import RefusedError


def shapes(path: Path, *, trusted: bool = False) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the tensors that the class of a config.json has in memory.

    Args:
        path: The directory that holds it.
        trusted: Whether code that it brings may be run.

    Raises:
        RefusedError: transformers cannot build it.
    """
    return {name: tuple(tensor.shape) for name, tensor in _state(path, trusted=trusted).items()}


def parameters(base: Checkpoint) -> tuple[int, list[int]]:
    """The number of parameters of the class of a config.json: outside the layers, and in each.

    Raises:
        RefusedError: transformers cannot build it, or builds other layers.
    """
    state = {
        id(tensor): (name, tensor)
        for name, tensor in _state(base.path, trusted=base.trusted).items()
    }
    sizes = {name: int(tensor.numel()) for name, tensor in state.values()}
    stacks = layer_names.by_stack(sizes).values()
    own = [stack for stack in stacks if stack.keys() == {*range(base.depth)}]
    if not own:
        raise RefusedError(
            f"{base.ref}: transformers does not build {base.depth} layers from its config.json"
        )
    per_layer = [sum(sum(stack[index].values()) for stack in own) for index in range(base.depth)]
    return sum(sizes.values()) - sum(per_layer), per_layer


def ties(path: Path, *, trusted: bool = False) -> Mapping[str, frozenset[str]]:
    """The tensors that the class has in memory, each with the others that it is tied to.

    Of those that are tied to one another transformers saves one. The arguments are those of
    `shapes`.

    Raises:
        RefusedError: transformers cannot build it.
    """
    state = _state(path, trusted=trusted)
    same: dict[int, set[str]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), set()).add(name)
    return {name: frozenset(same[id(tensor)] - {name}) for name, tensor in state.items()}


def _state(path: Path, *, trusted: bool) -> Mapping[str, Any]:
    return dict(build(path, trusted=trusted).state_dict(keep_vars=True))


def build(path: Path, *, trusted: bool = False) -> Any:
    """The model of a config.json, as its class builds it, without memory.

    The arguments are those of `shapes`.

    Raises:
        RefusedError: transformers cannot build it.
    """
    import torch  # noqa: PLC0415 - seconds
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    try:
        config: Any = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trusted)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if named is not None:
                return named._from_config(config)  # noqa: SLF001 - the classes have no public way
            make = transformers.AutoModelForCausalLM.from_config
            return make(config, trust_remote_code=trusted)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RefusedError(
            f"transformers cannot build the model: {reason.partition('. ')[0][:300]}",
            hint="--trust-remote-code runs the code that the model brings"
            if "trust_remote_code" in reason
            else None,
        ) from error


def stored_names(model: Any) -> Mapping[str, str]:
    """The name in a checkpoint of each parameter that a model has in memory.

    A parameter that is stored in parts has the name of its first part, and `*` in place of the
    number of an expert.

    Args:
        model: What `build` returns.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import WeightConverter  # noqa: PLC0415

    # As `save_pretrained` does it: what was done last is undone first.
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
