"""What there is to train: the new layers of a model, by the names that its class has in memory.

Trainers choose by these names, and they are not always those of the checkpoint. The class is built
without memory, so that no weights are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import task as tasks
from mergekit_interleave.architectures.task import Task
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import Checkpoint, config_errors
from mergekit_interleave.checkpoint.layer_names import check_apart, inside, stacks_of, within
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, DirectiveError, RefusedError
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import recorded_layout
from mergekit_interleave.planning import zeroing
from mergekit_interleave.training import selectors


@dataclass(frozen=True)
class Trainee:
    """A model whose new layers are to be trained.

    Attributes:
        directory: Where it is, as it was named.
        model_type: As config.json has it.
        task: What it is for.
        depth: Its number of layers.
        counted: How many LLaMA-Factory counts, which in some types is another number.
        new: The indices of the new ones.
        stacks: What stands before the index of a layer, such as `model.layers`.
        parameters: The names of all parameters.
        modules: The names of all modules.
        linear: The names of the modules that are matrices, which a LoRA can adapt.
        stacked: The names of the parameters that hold the matrices of several experts.
        closed: The names of the parameters in the new layers whose zeros, or gains, let nothing
            pass; of each branch the last one.
        half_dtype: The dtype of 16 bits that the new layers load as, such as `bfloat16`.
        quantized: Whether its weights are integers.
        has_remote_code: Whether it brings code of its own.
    """

    directory: str
    model_type: str
    task: Task
    depth: int
    counted: int | None
    new: tuple[int, ...]
    stacks: tuple[str, ...]
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    linear: frozenset[str]
    stacked: frozenset[str]
    closed: frozenset[str]
    half_dtype: str | None
    quantized: bool
    has_remote_code: bool

    @cached_property
    def trained(self) -> frozenset[str]:
        """The parameters of the new layers."""
        return frozenset(self.within(self.parameters))

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The weights that a LoRA of the new layers adapts: its matrices, and those of experts."""
        weights = {f"{module}.weight" for module in self.linear}
        return frozenset(self.within(weights | self.stacked))

    @cached_property
    def children(self) -> tuple[str, ...]:
        """What the new layers are made of: the words after their indices."""
        names = (inside(name).partition(".")[0] for name in self.within(self.parameters))
        return tuple(dict.fromkeys(names))

    def within(self, names: Iterable[str]) -> Iterable[str]:
        """Those of the names that belong to the new layers."""
        return within(names, self.stacks, self.new)


def read(directory: Path, models: Models, file: Path | None = None) -> Trainee:
    """Find out what there is to train.

    Args:
        directory: The model.
        models: Where it is opened.
        file: What says which layers are new, see `claim.read`.

    Raises:
        InterleaveError: It cannot be told, or there is nothing to train.
    """
    recorded_layout.check_directory(directory)
    if not str(directory).isprintable():
        raise CheckpointError(f"{directory!r}: no trainer can be told such a name")
    claimed = recorded_layout.read(directory, file)
    if not isinstance(claimed.directive.growth, ExplicitSlices):
        raise DirectiveError(
            f"{file}: a directive's layers depend on its model",
            hint="`mk-interleave gen` writes them out: --recipe with what it wrote",
        )
    layout = claimed.layout
    new = tuple(layer.index for layer in layout.new_layers)
    if not new:
        raise RefusedError(f"{directory}: none of its layers is new, so there is nothing to train")
    result = models.open(ModelRef(ModelPath(str(directory))))
    if result.depth != len(layout):
        raise RefusedError(
            f"{directory}: its config.json states {result.depth} layers, and its layout has "
            f"{len(layout)}"
        )
    with config_errors(directory):
        return _read(directory, result, layout, new)


def _read(directory: Path, result: Checkpoint, layout: Layout, new: tuple[int, ...]) -> Trainee:
    import torch  # noqa: PLC0415 - seconds
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    model = meta_model.build(directory, trusted=result.trusted)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    convolutions = tuple(f"{name}." for name, m in modules.items() if hasattr(m, "kernel_size"))
    found = stacks_of(parameters, len(layout), result.config)
    trained = list(within(parameters, found, new))
    check_apart(parameters, trained)
    dtypes = {parameters[name].dtype for name in trained}
    return Trainee(
        directory=str(directory),
        model_type=result.model_type,
        task=tasks.task_of(result.config),
        depth=len(layout),
        counted=selectors.llamafactory_depth(model.config),
        new=new,
        stacks=found,
        parameters=tuple(parameters),
        modules=tuple(modules),
        linear=frozenset(
            name
            for name, module in modules.items()
            if isinstance(module, Conv1D)
            or (isinstance(module, torch.nn.Linear) and _is_matrix(module))
        ),
        stacked=frozenset(
            name
            for name, parameter in parameters.items()
            if parameter.ndim == _MATRICES and not name.startswith(convolutions)
        ),
        closed=frozenset(_closed(meta_model.stored_names(model), found, layout, result)),
        half_dtype=next((str(d).partition(".")[2] for d in dtypes if d.itemsize == _COARSE), None),
        quantized=result.is_quantized,
        has_remote_code="auto_map" in result.config,
    )


def _is_matrix(module: Any) -> bool:
    """Whether a module computes what a matrix does: some routers and groups are one by name only.

    They are asked with a tensor that has a shape and no memory.
    """
    import torch  # noqa: PLC0415

    if type(module).forward is torch.nn.Linear.forward:
        return True
    given = torch.empty(1, 1, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        found = module(given)
    except Exception:  # noqa: BLE001 - whatever it wants, it is no matrix
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 1, module.out_features)


_COARSE = 2
"""The bytes of a number that is too coarse to be trained as it is."""

_MATRICES = 3
"""The axes of a parameter that holds the matrices of several experts."""


def _closed(
    stored: Mapping[str, str], stacks: Collection[str], layout: Layout, result: Checkpoint
) -> Iterable[str]:
    family = result.require_family()
    identities = zeroing.identities(layout, lambda _: family)
    gains = family.output_norms.all_names if family.output_norms else ()
    for layer in layout.new_layers:
        shut = layer.zeroed
        if layer.index in identities:
            shut = gains if zeroing.closes_gains(layer.edit, family) else family.residual_writers
        for name in within(stored, stacks, [layer.index]):
            if any(part in stored[name] for part in shut):
                yield name
