"""Build a grown model with transformers from the tensors of loaded models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import class_loading, layer_names, meta_model
from mergekit_interleave.checkpoint.class_loading import Loading
from mergekit_interleave.checkpoint.quantization import KEY
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.virtual import quantized_modules
from mergekit_interleave.virtual.state import shared_state


def build(plan: ExpansionPlan, models: Mapping[ModelRef, Any], folder: Path) -> tuple[Any, Loading]:
    """Build the model of a plan; it shares the memory of the source models.

    Args:
        plan: The plan.
        models: The loaded source models, all on one device, in one dtype and quantized alike.
        folder: A directory with the config.json and the other small files of the result.

    Returns:
        The model, and what its class did with the tensors.

    Raises:
        RefusedError: transformers cannot build the model, or a quantized tensor cannot be shared.
    """
    base = models[plan.layout.models[0]]
    quantized_modules.check_alike(models.values())
    with meta_model.transformers_errors("load the model", plan.first.ref):
        meta_model.hide_bars()
        config = meta_model.config_of(folder, trusted=plan.first.trusted)
        stated = getattr(config, KEY, None)
        config = meta_model.unquantized(config)
        state = shared_state(plan.specs, models)
        device = next(base.parameters()).device
        own_class = meta_model.class_of(config, trusted=plan.first.trusted)
        model, report = own_class.from_pretrained(
            None,
            config=config,
            state_dict=state.tensors,
            dtype=base.dtype,
            attn_implementation=_attention_of(base.config),
            ignore_mismatched_sizes=True,  # reported as what its class did
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
        model.requires_grad_(requires_grad=False)  # training must not change the source models
        _name(model, folder, str(base.name_or_path))
        loading = class_loading.loading_of(model, report)
        if quantized_modules.is_quantized(base):
            quantized_modules.insert(model, state.modules, base, stated)
    return model, loading


def _attention_of(config: Any) -> dict[str, Any]:
    """Return the attention kernels of a config and of its parts, for `from_pretrained`."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {
        key: part._attn_implementation  # noqa: SLF001 - there is no public name
        for key, part in {"": config, **parts}.items()
        if part is not None
    }


def _name(model: Any, folder: Path, name: str) -> None:
    """Give a model the generation config of its files, and the name of its tokenizer."""
    from transformers import GenerationConfig  # noqa: PLC0415 - takes seconds to import

    model.name_or_path = model.config.name_or_path = name
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def layers_of(model: Any, depth: int) -> dict[str, list[Any]]:
    """Return the modules of the layers of a model, by stack.

    Args:
        model: The model.
        depth: The number of layers.

    Raises:
        RefusedError: It is unknown which modules are the layers.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    stacks = layer_names.stacks_of(names, depth, model.config.to_dict())
    return {
        stack: [model.get_submodule(f"{stack}.{index}") for index in range(depth)]
        for stack in stacks
    }


def unshare(model: Any, layers: Collection[int], depth: int) -> None:
    """Give the parameters of some layers memory of their own.

    Args:
        model: The model.
        layers: The indices of the layers.
        depth: The number of all layers.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    parameters = dict(model.named_parameters(remove_duplicate=False))
    stacks = layer_names.stacks_of(parameters, depth, model.config.to_dict())
    for name in layer_names.within(parameters, stacks, layers):
        own = parameters[name].data.clone(memory_format=torch.contiguous_format)
        parameters[name].data = own


def memory_of(model: Any) -> dict[int, int]:
    """Return the sizes in bytes of the memory blocks of a model's parameters, by address."""
    parts = (part for parameter in model.parameters() for part in _parts(parameter))
    storages = [part.untyped_storage() for part in parts]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _parts(tensor: Any) -> Iterator[Any]:
    """Yield the tensors that a tensor consists of, if its class packs several of them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))
