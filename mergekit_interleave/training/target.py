"""Collect the parameters that are to be trained, those of the new layers by default.

Trainers select parameters by their names in the model's class, which can differ from the names in
the checkpoint. The class is built on the meta device, so no weights are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import task as tasks
from mergekit_interleave.architectures.family import Family
from mergekit_interleave.architectures.task import Task
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import Checkpoint, config_errors
from mergekit_interleave.checkpoint.layer_names import inside, stacks_of, within
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, DirectiveError, RefusedError
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import recorded_layout
from mergekit_interleave.planning import zeroing
from mergekit_interleave.training import selection
from mergekit_interleave.training.freeze import check_unshared


@dataclass(frozen=True)
class TrainingTarget:
    """A model of which certain layers, the new ones by default, are to be trained.

    Attributes:
        directory: The model's directory, as the user named it.
        model_type: The model type in config.json.
        task: The model's task.
        depth: The number of layers.
        config: The config object of the model's class.
        layers: The indices of the layers to train.
        stacks: The name components before a layer's index, such as `model.layers`.
        parameters: The names of all parameters; one outside the layers that has several names has
            only the first.
        modules: The names of all modules.
        linear: The names of the modules that are matrices, which a LoRA can adapt.
        experts: The names of the parameters that contain the matrices of several experts.
        zeroed: The names of the parameters in these layers whose zeros stop the gradient: the
            last parameter of each branch, a projection or a norm.
        half_dtype: The 16-bit dtype that these layers load as, such as `bfloat16`.
        is_quantized: Whether the weights are integers.
        has_remote_code: Whether the model has custom code.
        architecture: The name of the model's class in config.json, if it states one.
        only_new: Whether the layers are the new ones, and nothing outside the layers is trained.
        also: The names of the modules outside the layers that are trained too.
        tied: Whether one of these modules shares its tensor with another module.
        warnings: Problems in the file that records the layers, one sentence each.
        since: The model in the lineage whose layers are not new; None for the sources.
    """

    directory: str
    model_type: str
    task: Task
    depth: int
    config: Any = field(repr=False)
    layers: tuple[int, ...]
    stacks: tuple[str, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    linear: frozenset[str]
    experts: frozenset[str]
    zeroed: frozenset[str]
    half_dtype: str | None
    is_quantized: bool
    has_remote_code: bool
    architecture: str | None = None
    only_new: bool = True
    also: tuple[str, ...] = ()
    tied: bool = False
    warnings: tuple[str, ...] = ()
    since: str | None = None

    @property
    def loads_too_coarse(self) -> bool:
        """Whether the weights to train load with 16 bits, too few for most updates."""
        return self.half_dtype is not None and not self.is_quantized

    @property
    def exact_dtype(self) -> str | None:
        """The dtype that loads the weights without rounding; None if they are quantized."""
        return None if self.is_quantized else self.half_dtype or "float32"

    @cached_property
    def trained(self) -> frozenset[str]:
        """The parameters to train."""
        outside = tuple(f"{module}." for module in self.also)
        return frozenset(self.within(self.parameters)) | {
            name for name in self.parameters if name.startswith(outside)
        }

    @cached_property
    def adapted(self) -> frozenset[str]:
        """All matrices of the layers to train, including those of experts, which a LoRA adapts."""
        weights = {f"{module}.weight" for module in self.linear}
        return frozenset(self.within(weights | self.experts))

    @cached_property
    def children(self) -> tuple[str, ...]:
        """The names of the direct submodules and parameters of the layers to train."""
        names = (inside(name).partition(".")[0] for name in self.within(self.parameters))
        return tuple(dict.fromkeys(names))

    def within(self, names: Iterable[str]) -> Iterable[str]:
        """Return the names that belong to the layers to train."""
        return within(names, self.stacks, self.layers)


def read(  # noqa: PLR0913 - one parameter for each option of `train`
    directory: Path,
    models: Models,
    file: Path | None = None,
    since: str | None = None,
    *,
    layers: str = selection.NEW,
    also: Sequence[str] = (),
) -> TrainingTarget:
    """Collect the parameters of a model that are to be trained.

    Args:
        directory: The model's directory.
        models: Opens the model.
        file: The file that records which layers are new; see `recorded_layout.read`.
        since: See `RecordedLayout.since`.
        layers: The layers to train; see `selection.select`.
        also: The modules outside the layers to train; see `selection.known_outside`.

    Raises:
        InterleaveError: The layers are not known, or there are none.
    """
    recorded_layout.check_directory(directory)
    if not str(directory).isprintable():
        raise CheckpointError(f"{directory!r}: settings cannot contain unprintable characters")
    recorded = recorded_layout.read(directory, file)
    if not isinstance(recorded.directive.growth, ExplicitSlices):
        raise DirectiveError(
            f"{file}: is a directive, whose layers depend on its model",
            hint="write the layers with `mk-interleave gen`, and pass that file to --recipe",
        )
    layout = recorded.since(since)
    result = models.open(ModelRef(ModelPath(str(directory))))
    if result.depth != len(layout):
        raise RefusedError(
            f"{directory}: config.json has {result.depth} layers, but the recorded layout has "
            f"{len(layout)}"
        )
    chosen = selection.select(layout, result.family, layers, model=str(directory))
    target = _read(directory, result, layout, chosen, also)
    return replace(target, warnings=recorded.directive.warnings, since=since)


def _read(
    directory: Path,
    result: Checkpoint,
    layout: Layout,
    layers: tuple[int, ...],
    also: Sequence[str],
) -> TrainingTarget:
    import torch  # noqa: PLC0415 - takes seconds
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    model = meta_model.build(directory, trusted=result.trusted)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    convolutions = tuple(f"{name}." for name, m in modules.items() if hasattr(m, "kernel_size"))
    with config_errors(directory):
        task = tasks.task_of(result.config)
        family, is_quantized = result.require_family(), result.is_quantized
    stacks = stacks_of(parameters, len(layout), result.config)
    in_layers = frozenset(within(parameters, stacks, range(len(layout))))
    trained = list(within(parameters, stacks, layers))
    check_unshared(parameters, trained)
    dtypes = {parameters[name].dtype for name in trained}
    stored = meta_model.stored_names(model)
    unique = dict(model.named_parameters())  # trainers go through these names
    modules_outside, tied = _outside(model, also, unique)
    return TrainingTarget(
        directory=str(directory),
        model_type=result.model_type,
        task=task,
        depth=len(layout),
        config=model.config,
        layers=layers,
        stacks=stacks,
        parameters=tuple(name for name in parameters if name in unique or name in in_layers),
        modules=tuple(modules),
        linear=frozenset(
            name
            for name, module in modules.items()
            if isinstance(module, Conv1D)
            or (isinstance(module, torch.nn.Linear) and _is_matrix(module))
        ),
        experts=frozenset(
            name
            for name, parameter in parameters.items()
            # Other models of a composite have such parameters too, such as a class token.
            if parameter.ndim == _EXPERT_AXES
            and name in in_layers
            and not name.startswith(convolutions)
        ),
        zeroed=frozenset(_zeroed(stored, stacks, layout, layers, family)),
        half_dtype=next((str(d).partition(".")[2] for d in dtypes if d.itemsize == _HALF), None),
        is_quantized=is_quantized,
        has_remote_code="auto_map" in result.config,
        architecture=(result.config.get("architectures") or [None])[0],
        only_new=not also and layers == tuple(layer.index for layer in layout.new_layers),
        also=modules_outside,
        tied=tied,
    )


def _outside(
    model: Any, names: Sequence[str], unique: Mapping[str, object]
) -> tuple[tuple[str, ...], bool]:
    """Return the modules outside the layers to train, by the names that trainers see, and `tied`.

    Args:
        model: The model.
        names: See `selection.known_outside`.
        unique: Its parameters, each under its first name only.
    """
    first = {id(parameter): name for name, parameter in unique.items()}
    found: dict[str, None] = {}
    tied = False
    known = [module for _, module in selection.known_outside(model).values()]
    for _, module in selection.outside_layers(model, names):
        own = {id(parameter) for parameter in module.parameters()}
        others = {id(p) for m in known if m is not module for p in m.parameters()}
        tied |= bool(own & others)
        found |= dict.fromkeys(first[each].rpartition(".")[0] for each in own)
    return tuple(found), tied


def _is_matrix(module: Any) -> bool:
    """Return whether a Linear multiplies by its weight; some routers only inherit from it.

    This is tested with a tensor on the meta device.
    """
    import torch  # noqa: PLC0415

    if type(module).forward is torch.nn.Linear.forward:
        return True
    inputs = torch.empty(1, 1, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        outputs = module(inputs)
    except Exception:  # noqa: BLE001 - a module that needs other arguments is not a matrix
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (1, 1, module.out_features)


_HALF = 2
"""The number of bytes of a 16-bit number."""

_EXPERT_AXES = 3
"""The number of axes of a parameter that contains the matrices of several experts."""


def _zeroed(
    stored: Mapping[str, str],
    stacks: Collection[str],
    layout: Layout,
    layers: Collection[int],
    family: Family,
) -> Iterable[str]:
    """Yield the names for `TrainingTarget.zeroed`.

    Args:
        stored: The name of each parameter in the checkpoint, by its name in the class.
        stacks: See `TrainingTarget.stacks`.
        layout: The layers.
        layers: See `TrainingTarget.layers`.
        family: The family of the model.
    """
    identities = zeroing.identities(layout, lambda _: family)
    gains = family.output_norms.all_names if family.output_norms else ()
    for layer in (layout.layers[index] for index in layers):
        zeroed = layer.zeroed
        if layer.index in identities:
            closed = zeroing.zeroes_output_norms(layer.edit, family)
            zeroed = gains if closed else family.residual_writers
        for name in within(stored, stacks, [layer.index]):
            if any(part in stored[name] for part in zeroed):
                yield name
