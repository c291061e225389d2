"""Freeze a loaded model except for its new layers. Only torch needs to be installed for this.

The interleave.json next to the loaded weights records which layers are new.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import hub, layer_names
from mergekit_interleave.checkpoint.checkpoint import CONFIG
from mergekit_interleave.directive.model_ref import ModelPath
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    RefusedError,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import manifest, recorded_layout
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.training import selection

GROWN = "grown_layout"
"""The attribute with the layers of a model whose parameters may share the memory of others."""


def freeze_original_layers(
    model: Any,
    manifest_path: str | os.PathLike[str] | None = None,
    *,
    layers: str = selection.NEW,
    also: Sequence[str] = (),
    since: str | None = None,
) -> list[str]:
    """Freeze a model except for its new layers, or for other layers that you name.

    This sets `requires_grad` of every parameter. Call it before you create an optimizer or a
    trainer, and before the model is distributed: each of these reads `requires_grad` only once. In
    a model that `load` returned, what will be trained gets memory of its own.

    Args:
        model: A PyTorch model loaded by transformers. It may be compiled, or a submodule of
            another module.
        manifest_path: The interleave.json, or its directory. By default it is read from the
            directory or Hub repository that the model was loaded from. A model that `load`
            returned needs none.
        layers: The layers to train: `new`, `seams` (the layers at both sides of each merge seam) or
            a range of indices such as `8:24`; several are separated by commas.
        also: What to train outside the layers: `lm_head`, `embed_tokens`, or the names that the
            model's class has for them. If they share one tensor, either name trains it.
        since: A model in the lineage of a model that was grown several times. All layers that it
            does not have are trained. By default, those that the last growth added are trained.

    Returns:
        The names of the parameters that will be trained, in the model's order.

    Raises:
        TypeError: `model` is not a model.
        CheckpointError: No file records which layers are new.
        DirectiveError: `since` is not in the lineage, `layers` has an unknown word, or the model
            has no module that `also` names.
        LayoutError: The model has no such layers.
        RefusedError: The file belongs to another model, or these layers cannot be trained alone.
    """
    if not hasattr(model, "named_parameters"):
        raise TypeError(
            "expected a loaded model, such as AutoModelForCausalLM.from_pretrained returns, not "
            f"{model!r:.60}"
        )
    try:
        layout = getattr(_inner(model), GROWN, None)
        if layout is None or manifest_path is not None or since is not None:
            layout = _recorded(*_record_place(_inner(model), manifest_path)).since(since)
        return freeze(model, layout, layers, also)
    except InterleaveError as error:
        if error.hint and hasattr(error, "add_note"):  # Python 3.11 prints it below the message
            error.add_note(f"hint: {error.hint}")
        raise


def _inner(model: Any) -> Any:
    """Return the model of transformers that may be inside another module."""
    return next((module for module in model.modules() if hasattr(module, "name_or_path")), model)


def freeze(
    model: Any, layout: Layout, layers: str = selection.NEW, also: Sequence[str] = ()
) -> list[str]:
    """Freeze a model whose layers are known; see `freeze_original_layers`."""
    import torch  # noqa: PLC0415 - takes seconds to import

    inner = _inner(model)
    config = inner.config.to_dict() if hasattr(inner, "config") else {}
    family = families.family_of_config(config) if config else None
    chosen = selection.select(
        layout, family, layers, option='freeze_original_layers(model, layers="{}")'.format
    )
    if hasattr(model, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise RefusedError(
            "the model has adapters, which would be frozen too",
            hint="`mk-interleave train DIR --for peft` writes a LoRA of the new layers only",
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stacks = layer_names.stacks_of(parameters, len(layout), config)
    trained = list(layer_names.within(parameters, stacks, chosen))
    _check(parameters, trained)
    wanted = {id(parameters[name]) for name in trained} | {
        id(parameter)
        for _, module in selection.outside_layers(inner, also)
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        if id(parameter) in wanted and hasattr(inner, GROWN):
            own = parameter.data.clone(memory_format=torch.contiguous_format)
            parameter.data = own
    return [name for name, parameter in parameters.items() if id(parameter) in wanted]


def _recorded(directory: Path, file: Path | None) -> RecordedLayout:
    try:
        recorded = recorded_layout.read(directory, file)
        recorded.layout  # noqa: B018 - raises if the file is a directive
    except (CheckpointError, DirectiveError) as error:
        raise CheckpointError(
            str(error),
            hint="pass the interleave.json of the expansion: "
            "freeze_original_layers(model, 'path/interleave.json')",
        ) from error
    return recorded


def _check(parameters: dict[str, Any], trained: list[str]) -> None:
    """Check that the new layers can be trained, and that they share no parameter with others."""
    check_unshared(parameters, trained)
    for name in trained:
        if not parameters[name].is_floating_point():
            raise RefusedError(
                f"{name} is quantized, and integers cannot be trained",
                hint="`mk-interleave train DIR --for peft` writes a LoRA of the new layers",
            )


def check_unshared(parameters: Mapping[str, object], trained: Collection[str]) -> None:
    """Check that no parameter of the layers to train is shared with another layer.

    Args:
        parameters: All parameters, under each of their names.
        trained: The names of the parameters of the layers to train.

    Raises:
        RefusedError: A parameter is shared, so training it would change an original layer.
    """
    new = {*trained}
    others = {id(parameter): name for name, parameter in parameters.items() if name not in new}
    for name in trained:
        if id(parameters[name]) in others:
            raise RefusedError(
                f"{name} and {others[id(parameters[name])]} are the same parameter, so these "
                "layers cannot be trained alone"
            )


def _record_place(model: Any, path: str | os.PathLike[str] | None) -> tuple[Path, Path | None]:
    """Return the directory that records which layers are new, and the file if one was named."""
    if path is not None:
        place = Path(path)
        return (place, None) if place.is_dir() else (place.parent, place)
    loaded = str(getattr(model, "name_or_path", "") or "")
    if loaded and Path(loaded).is_dir():
        return Path(loaded), None
    if not loaded or not hub.is_hub_id(loaded):
        raise CheckpointError(
            "the model does not record where it was loaded from",
            hint="pass its interleave.json: freeze_original_layers(model, 'path/interleave.json')",
        )
    where = ModelPath(loaded)  # a loaded model does not record its revision
    hub.fetch_files(where, wanted=[CONFIG, manifest.FILE, mergekit_yaml.FILE])
    return hub.fetch_config(where, cached_only=True), None
