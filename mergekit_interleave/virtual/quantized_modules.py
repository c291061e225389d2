"""Share the quantized modules of a loaded model.

A quantized weight belongs to a module that can read it, so a grown model gets copies of the module
that share all its tensors. It is built without quantization, with zeros in place of the quantized
weights; a projection that the plan zeroes keeps those zeros.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mergekit_interleave.checkpoint import layer_names, meta_model
from mergekit_interleave.checkpoint.quantization import quantized_modules
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.virtual.memory_names import MemoryNames
from mergekit_interleave.virtual.values import Zeros

_UNCONVERTED: Mapping[str, str] = {
    "bitsandbytes": "llm_int8_skip_modules",
    "torchao": "modules_to_not_convert",
}
"""The methods whose models can be saved, each with its setting that lists the modules which are not
quantized. Others pack their weights anew after loading."""

_INT8 = 1
"""The bytes of a number in the widest quantized dtype."""


@dataclass(frozen=True)
class Source:
    """A loaded source model.

    Attributes:
        model: The model.
        plain: The same model without quantization, on the meta device; `model` itself if it is not
            quantized.
        modules: The quantized modules by path.
    """

    model: Any
    plain: Any
    modules: Mapping[str, Any]

    @cached_property
    def stand_ins(self) -> frozenset[str]:
        """The tensors of `plain` for which the model has quantized ones."""
        state = self._own
        return frozenset(
            name
            for name, tensor in self.plain.state_dict().items()
            if self.owner(name) is not None and not _is_plain(state.get(name), tensor)
        )

    @cached_property
    def _own(self) -> Mapping[str, Any]:
        """The tensors of the model. `state_dict` would repack quantized weights, with errors."""
        pairs = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        return {name: tensor.detach() for name, tensor in pairs}

    def tensors(self, zeros: Zeros) -> Mapping[str, Any]:
        """Return the tensors of `plain` by name, with zeros for quantized ones."""
        if not self.modules:
            found: Mapping[str, Any] = self.model.state_dict()
            return found
        place = {"device": next(self.model.parameters()).device, "dtype": self.model.config.dtype}
        return {
            name: zeros.like(tensor, **place) if name in self.stand_ins else self._own[name]
            for name, tensor in self.plain.state_dict().items()
        }

    def owner(self, name: str) -> str | None:
        """Return the path of the quantized module that has a tensor, or None."""
        ends = (match.start() for match in re.finditer(r"\.", name))
        return next((name[:end] for end in ends if name[:end] in self.modules), None)


def is_quantized(model: Any) -> bool:
    """Whether a loaded model is quantized in memory."""
    return getattr(model, "hf_quantizer", None) is not None


def method_of(model: Any) -> str:
    """Return the name of the method that a model is quantized by."""
    method = model.hf_quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def check_alike(models: Collection[Any]) -> None:
    """Check that source models are quantized by the same method.

    Raises:
        RefusedError: They are not.
    """
    methods = {method_of(model) if is_quantized(model) else "no method" for model in models}
    if len(methods) > 1:
        raise RefusedError(
            f"the models are quantized by {' and '.join(sorted(methods))}",
            hint="load all of them alike",
        )


def settings_on_loading(model: Any) -> Any:
    """Return the settings with which transformers quantized a model on loading, if it did."""
    if not is_quantized(model) or model.hf_quantizer.pre_quantized:
        return None
    return copy.deepcopy(model.hf_quantizer.quantization_config)


def source_of(model: Any) -> Source:
    """Return a loaded model with its quantized modules.

    Raises:
        RefusedError: They cannot be shared.
    """
    if not is_quantized(model):
        return Source(model, model, {})
    import torch  # noqa: PLC0415 - takes seconds to import

    config = meta_model.unquantized(copy.deepcopy(model.config))
    with torch.device("meta"):
        plain = type(model)._from_config(config, dtype=config.dtype)  # noqa: SLF001 - as no public one
    modules = dict(_unlike(model, plain))
    for path, module in (("", model), *modules.items()):
        if any(hasattr(part, "layer_idx") for part in module.modules() if path) or _is_hooked(
            module
        ):
            raise RefusedError(
                f"{path or type(model).__name__}: the loaded model is quantized by "
                f"{method_of(model)}, which changes more than single projections",
                hint="pass a `base` that was called once, or was loaded with `dequantize=True`",
            )
    return Source(model, plain, modules)


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)  # noqa: SLF001 - as no public one


def _unlike(module: Any, plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the outermost modules that are not as they are without quantization."""
    own = dict(module.named_parameters(recurse=False))
    others = dict(plain.named_parameters(recurse=False))
    same = own.keys() == others.keys() and all(_is_plain(own[n], others[n]) for n in own)
    if type(module) is not type(plain) or not same:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _unlike(child, plain.get_submodule(name), f"{path}.{name}".lstrip("."))


def _is_plain(tensor: Any, like: Any) -> bool:
    """Whether a tensor holds plain floats in the shape of another."""
    import torch  # noqa: PLC0415

    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and tensor.element_size() > _INT8
        and tensor.shape == like.shape
    )


def plain_names(name: str) -> tuple[str, ...]:
    """Return the names that a part of a quantized tensor may have without quantization."""
    module = name.rpartition(".")[0]
    return re.sub(r"_(blocks|scales)$", "", name), module, f"{module}.weight"


def plain_specs(
    specs: Sequence[TensorSpec], names: Mapping[str, MemoryNames]
) -> Sequence[TensorSpec]:
    """Join the parts of tensors that are stored quantized; a tensor is zeroed if a part is.

    Args:
        specs: The planned tensors.
        names: The names in memory of all tensors that the class loads without quantization.
    """
    quantized = quantized_modules({spec.source: spec.tensor.dtype for spec in specs})
    found: dict[tuple[str, str], TensorSpec] = {}
    for spec in specs:
        pairs = [(spec.source, spec.name)]
        if spec.source.rpartition(".")[0] in quantized:
            pairs += zip(plain_names(spec.source), plain_names(spec.name), strict=True)
        known = next((pair for pair in pairs if pair[0] in names), None)
        if known is None:
            continue
        first = found.setdefault(known, replace(spec, source=known[0], name=known[1]))
        if spec.scale == 0:
            found[known] = replace(first, scale=0)
    return [*found.values()]


def placed(
    source: Source,
    specs: Sequence[TensorSpec],
    names: Mapping[str, MemoryNames],
    moved: Callable[[str, TensorSpec], str],
) -> dict[str, str]:
    """Return the paths in the grown model of the quantized modules that it shares.

    Args:
        source: The source model.
        specs: The planned tensors that come from it.
        names: The names that they have in memory.
        moved: Returns the new name of something in the layer of a planned tensor.

    Returns:
        The path in the source model for each path. Zeroed modules are left out.

    Raises:
        RefusedError: A quantized tensor would be changed.
    """
    groups: dict[tuple[str, str], list[tuple[TensorSpec, bool]]] = {}
    for spec in specs:
        for name in names[spec.source].names:
            path = source.owner(name)
            if path is not None:
                group = groups.setdefault((moved(path, spec), path), [])
                group.append((spec, name in source.stand_ins))
    found = {}
    for (target, path), group in groups.items():
        if all(spec.scale == 0 for spec, is_quantized in group if is_quantized):
            continue
        changed = next((spec.name for spec, _ in group if not spec.is_unchanged), None)
        if changed is not None:
            raise RefusedError(
                f"{changed} cannot be computed, because the loaded model is quantized by "
                f"{method_of(source.model)}",
                hint="use `run`, and load what it writes with the same quantization",
            )
        found[target] = path
    return found


def check_placed(sources: Collection[Source], paths: Collection[str]) -> None:
    """Check that all quantized modules outside the layers have a place.

    Args:
        sources: The source models.
        paths: The paths of the modules in the grown model.

    Raises:
        RefusedError: One has none, because it is not stored under its own name.
    """
    for source in sources:
        for path in source.modules:
            if layer_names.parse(f"{path}.weight") is None and path not in paths:
                raise RefusedError(
                    f"{path} is quantized by {method_of(source.model)}, but the checkpoint does "
                    "not store it under this name"
                )


def insert(model: Any, modules: Mapping[str, Any], base: Any, stated: Any) -> None:
    """Give a model that was built without quantization its quantized modules.

    Args:
        model: The grown model.
        modules: The modules of the source models, by path in the grown model.
        base: The quantized model of the first layer.
        stated: The quantization in the config.json of the grown model; None if it has none.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig  # noqa: PLC0415 - takes seconds

    for path, module in modules.items():
        model.set_submodule(path, alias(module))
    quantizer = copy.copy(base.hf_quantizer)
    settings = copy.deepcopy(quantizer.quantization_config)
    if isinstance(stated, Mapping):
        settings = AutoQuantizationConfig.from_dict(dict(stated))
    unconverted = [
        name
        for name, module in model.named_modules()
        if not any(name == path or name.startswith(f"{path}.") for path in modules)
        and any(part.ndim > 1 for part in module.parameters(recurse=False))
    ]
    if method_of(base) in _UNCONVERTED:
        setattr(settings, _UNCONVERTED[method_of(base)], unconverted)
        quantizer.modules_to_not_convert = unconverted
    quantizer.quantization_config = model.config.quantization_config = settings
    model.hf_quantizer = quantizer
    for name in _FLAGS:
        if name in vars(base):
            setattr(model, name, getattr(base, name))
    model.config._is_quantized = True  # noqa: SLF001 - as transformers does


def check_savable(model: Any) -> None:
    """Check that a grown quantized model can be saved.

    Raises:
        RefusedError: Its method does not store what is in memory, or it is unknown whether it does.
    """
    method = method_of(model)
    if method not in _UNCONVERTED:
        raise RefusedError(
            f"the model is quantized by {method}, and how that stores what is in memory is unknown",
            hint="use `run`, which copies the stored tensors",
        )
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise RefusedError(
                f"{name} was repacked for this CPU by the first pass of the model or of its base, "
                f"and {method} restores it with errors",
                hint="load the base again, and save the model before its first pass",
            )


_FLAGS = ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""What transformers notes at a quantized model."""


def alias(module: Any) -> Any:
    """Return a copy of a module that shares all its tensors, and is not trained."""
    import torch  # noqa: PLC0415

    found = copy.copy(module)
    found._parameters = {  # noqa: SLF001 - the parts of a module have no public setter
        name: torch.nn.Parameter(each.detach(), requires_grad=False)
        if each is not None and each.requires_grad
        else each
        for name, each in module._parameters.items()  # noqa: SLF001
    }
    found._buffers = dict(module._buffers)  # noqa: SLF001
    found._modules = {  # noqa: SLF001
        name: each if each is None else alias(each)
        for name, each in module._modules.items()  # noqa: SLF001
    }
    return found
