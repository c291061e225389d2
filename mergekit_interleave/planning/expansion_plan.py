"""Plan an expansion: its sources and every tensor, config and file of the result.

Cheap checks run before anything is fetched, and all checks run before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes, _out_files
from mergekit_interleave.architectures import compatibility
from mergekit_interleave.checkpoint import extra_files, layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint, config_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import Tensor
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import OutputError, RefusedError, Warn, collected_warnings
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import grown_config, zeroing
from mergekit_interleave.planning.grown_config import GrownConfig
from mergekit_interleave.planning.per_layer_config import Placement
from mergekit_interleave.planning.public_names import PublicNames
from mergekit_interleave.planning.resolve import Expansion, models_for
from mergekit_interleave.planning.tensor_plan import Dtypes, TensorSpec, assemble

TOKENIZER = "made for another tokenizer"
"""The reason why embeddings and head cannot be compared after a change of the tokenizer."""


@dataclass(frozen=True)
class ExpansionPlan:
    """The plan of a result.

    Attributes:
        expansion: The directive and its layout.
        sources: The models that layers are taken from.
        base: The model that config, tokenizer and small files are taken from.
        public: The public names of the models.
        grown: The config.json of the result.
        specs: Every tensor of the result.
        dtype: The dtype to write into config.json, or None to keep the base's.
        small_files: The files of the base to copy, each as the name in the model and the path.
        warnings: The warnings, including those of the expansion.
    """

    expansion: Expansion
    sources: Mapping[ModelRef, Checkpoint]
    base: Checkpoint
    public: PublicNames
    grown: GrownConfig
    specs: Sequence[TensorSpec]
    dtype: str | None
    small_files: Sequence[tuple[str, Path]]
    warnings: tuple[str, ...] = ()

    @property
    def placement(self) -> Placement:
        """The per-layer keys of config.json."""
        return self.grown.placement

    @property
    def mergekit(self) -> Mapping[str, object]:
        """The directive's keys that belong to mergekit."""
        return self.expansion.directive.mergekit

    @cached_property
    def layout(self) -> Layout:
        """The layers, including the scales from mergekit's top-level parameters."""
        return mergekit_yaml.effective(self.expansion.layout, self.mergekit)

    @property
    def recipe(self) -> str:
        """The mergekit YAML, without local paths."""
        return mergekit_yaml.to_yaml(
            self.expansion.layout, self.mergekit, self.public, self.expansion.modules
        )

    @property
    def first(self) -> Checkpoint:
        """The model of the first layer."""
        return self.sources[self.layout.models[0]]

    @property
    def parameters(self) -> int:
        """The number of parameters of the result."""
        return sum(math.prod(spec.shape) for spec in self.specs)

    @property
    def uses_lora(self) -> bool:
        """Whether mergekit merges a LoRA into a source first."""
        return any(model.lora for model in self.sources)

    def reason_unread(self, spec: TensorSpec) -> str | None:
        """Return why a tensor cannot be compared with its source, or None if it can."""
        if spec.model.lora is not None:
            return "a LoRA was merged into it"
        rows = (self._vocabulary,) if self._vocabulary else spec.shape[:1]
        if mergekit_yaml.changes_vocabulary(self.mergekit) and spec.layer is None:
            return TOKENIZER if spec.shape[:1] == rows else None
        return None

    @cached_property
    def _vocabulary(self) -> int | None:
        """The number of rows of the embeddings, or None if their tensor is unknown."""
        tensors = self.first.tensors
        names = [name for name in self.first.require_family().before_layers if name in tensors]
        return tensors[names[0]].shape[0] if names else None

    @property
    def conversion(self) -> str | None:
        """The dtype conversions, such as `F32 → BF16`; None if no tensor is converted."""
        changed = {" → ".join(spec.dtypes) for spec in self.specs if len(spec.dtypes) > 1}
        return ", ".join(sorted(changed)) or None

    def config(self, vocab_size: int | None = None) -> dict[str, Any]:
        """Return the config.json of the result."""
        return self.grown.config(self.base.config, dtype=self.dtype, vocab_size=vocab_size)

    def carried(self, warn: Warn) -> Iterator[tuple[str, bytes]]:
        """Yield the name and content of each small file of the result.

        Args:
            warn: Called with each warning.

        Raises:
            CheckpointError: A file cannot be read or is malformed.
        """
        for name, file in self.small_files:
            with config_errors(self.base.path, name):
                content = extra_files.read(name, file, self.base, warn)
            if content is not None:
                content = grown_config.moved_file(name, content, self.first, self.layout)
            if content is not None:
                yield name, content

    @cached_property
    def identities(self) -> frozenset[int]:
        """The indices of the new layers that pass their input on unchanged."""
        return zeroing.identities(
            self.layout,
            lambda model: self.sources[model].require_family(),
            lambda layer: self.sources[layer.model].layer_tensors(layer.source),
        )

    @property
    def is_identity(self) -> bool:
        """Whether the result computes the same as its base, apart from dtype conversion."""
        layers = self.layout.layers
        kept = [layer.source for layer in layers if not layer.new]
        return (
            len(self.sources) == 1
            and not self.uses_lora
            and not mergekit_yaml.changes_tokenizer(self.mergekit)
            and kept == list(range(self.first.depth))
            and self.identities == {layer.index for layer in layers if layer.new}
            and all(spec.scale in (None, 1) for spec in self.specs if spec.layer is None)
        )


def vocab_size(tensors: Mapping[str, Tensor], plan: ExpansionPlan) -> int:
    """Return the number of rows of the embeddings that mergekit made for another tokenizer.

    Args:
        tensors: The tensors of the result.
        plan: The plan of the result.

    Raises:
        RefusedError: It is unknown which tensor holds the embeddings.
    """
    before = plan.first.require_family().before_layers
    if not before or before[0] not in tensors:
        raise RefusedError(
            f"it is unknown which tensor of model type {plan.first.model_type} holds the embeddings"
        )
    return tensors[before[0]].shape[0]


def plan_expansion(
    expansion: Expansion,
    models: Models,
    out: Path | None,
    *,
    base_model: str | None = None,
    mix: bool = False,
) -> ExpansionPlan:
    """Plan the result of an expansion.

    Args:
        expansion: The directive and its layout.
        models: Fetches the files of the source models.
        out: The absolute path of the result; None if nothing will be written.
        base_model: The Hub id of the only source model, if its directory does not state one.
        mix: Stack models even if they are not compatible.

    Raises:
        InterleaveError: The result cannot be produced.
    """
    with collected_warnings() as warnings:
        warnings.extend(expansion.warnings)
        models = models_for(expansion.directive, models)
        keys = expansion.directive.mergekit
        opened = open_sources(expansion, models, base_model=base_model, mix=mix)
        base = opened.base
        if out is not None:
            for checkpoint in (*opened.models.values(), base):
                check_out(out, checkpoint)
            warnings.extend(models.fetch_small_files(base))
            for checkpoint in opened.models.values():
                models.fetch_card(checkpoint)
        sources = {model: models.with_weights(model) for model in opened.models}
        base = sources.get(base.ref, base)
        for checkpoint in sources.values():
            checkpoint.check_depth()
            _check_metadata(checkpoint)
            _check_adapter(checkpoint)
        layout = mergekit_yaml.effective(expansion.layout, keys)
        grown = grown_config.grow(sources, layout)
        dtypes = Dtypes(*mergekit_yaml.dtypes_of(keys))
        specs = assemble(layout, sources, dtypes, grown.placement.kv_sharing_layers)
        _check_needed(specs, base)
        tokenizer = extra_files.TOKENIZER_FILES if mergekit_yaml.changes_tokenizer(keys) else ()
        return ExpansionPlan(
            expansion=expansion,
            sources=sources,
            base=base,
            public=opened.public,
            grown=grown,
            specs=specs,
            dtype=mergekit_yaml.dtype_of(keys) or _dtype_of(specs, base),
            small_files=tuple(extra_files.collect(base, without=tokenizer, warn=warnings.append)),
            warnings=tuple(dict.fromkeys(warnings)),
        )


@dataclass(frozen=True)
class Sources:
    """The source models, checked to be compatible.

    Attributes:
        models: The models that layers are taken from.
        base: The model that config, tokenizer and small files are taken from.
        public: The public names of the models.
    """

    models: Mapping[ModelRef, Checkpoint]
    base: Checkpoint
    public: PublicNames

    def grow(self, expansion: Expansion) -> GrownConfig:
        """Derive the config.json of an expansion from the configs of its sources alone."""
        keys = expansion.directive.mergekit
        return grown_config.grow(self.models, mergekit_yaml.effective(expansion.layout, keys))


def open_sources(
    expansion: Expansion, models: Models, *, base_model: str | None = None, mix: bool = False
) -> Sources:
    """Open the source models and check from their configs that they are compatible.

    Args:
        expansion: The directive and its layout.
        models: Opens the models that `resolve` did not open.
        base_model: The Hub id of the only source model, if its directory does not state one.
        mix: Stack models even if they are not compatible.

    Raises:
        InterleaveError: A model cannot be opened, or the models are not compatible.
    """

    def opened_by(model: ModelRef) -> Checkpoint:
        return expansion.sources.get(model) or models.open(model)

    sources = {model: opened_by(model) for model in expansion.layout.models}
    base = opened_by(expansion.base)
    opened = {**sources, base.ref: base}
    _check_alone(opened, base)
    for checkpoint in opened.values():
        _check_fit(checkpoint, base, mix=mix)
    return Sources(sources, base, PublicNames.of(opened, base_model))


def _check_alone(opened: Mapping[ModelRef, Checkpoint], base: Checkpoint) -> None:
    """Refuse several models of a type whose compatibility cannot be checked."""
    directories = {checkpoint.path.resolve() for checkpoint in opened.values()}
    if len(directories) > 1 and base.require_family().must_agree is None:
        raise RefusedError(
            f"models of type {base.model_type} cannot be stacked on each other, because it is "
            "unknown which settings must be equal"
        )


def _check_fit(model: Checkpoint, base: Checkpoint, *, mix: bool) -> None:
    family = base.require_family()
    if model.require_family().layer_prefix != family.layer_prefix or (
        model.model_type != base.model_type and not mix
    ):
        mismatch: tuple[str, object, object] | None = ("type", model.model_type, base.model_type)
    else:
        with config_errors(model.path):
            mismatch = (
                None if mix else compatibility.disagreement(model.config, base.config, family)
            )
    if mismatch is not None:
        key, of_model, of_base = mismatch
        raise RefusedError(
            f"{model.ref} cannot be stacked with {base.ref}: {key} is {of_model!r} in {model.ref} "
            f"and {of_base!r} in {base.ref}",
            hint="`mk-interleave run --mergekit allow_crimes=true` stacks them anyway"
            if _same_shapes(model, base)
            else None,
        )


def _same_shapes(model: Checkpoint, other: Checkpoint) -> bool:
    """Whether the tensors of two models are known to have the same names and shapes."""
    if not (model.has_weights and other.has_weights):
        return False
    shapes, others = (
        {(layer_names.inside(name), tensor.shape) for name, tensor in each.tensors.items()}
        for each in (model, other)
    )
    return shapes == others


def _check_metadata(checkpoint: Checkpoint) -> None:
    """Refuse header metadata that names layers, because it is copied but layers are renumbered."""
    for shard in {tensor.shard for tensor in checkpoint.tensors.values()}:
        for key, value in shard.metadata.items():
            if checkpoint.names_a_layer(key) or checkpoint.names_a_layer(value):
                raise RefusedError(
                    f"{shard.file}: the header has metadata about single layers ({key!r}), which "
                    "cannot be derived for new layers",
                    hint="load the model without quantization, save it and grow the saved model",
                )


def _check_adapter(checkpoint: Checkpoint) -> None:
    """Refuse a model with an adapter beside it, which transformers would load with the model."""
    if (checkpoint.path / _out_files.ADAPTER).exists():
        raise RefusedError(
            f"{checkpoint.ref}: has an adapter, {_out_files.ADAPTER}, which transformers loads "
            "with the model, but whose layers cannot be grown",
            hint=f"merge the adapter into the weights with PEFT, or remove {_out_files.ADAPTER} "
            "from the directory to grow the model without it",
        )


def _check_needed(specs: Sequence[TensorSpec], base: Checkpoint) -> None:
    """Refuse a model without a buffer that its class would compute from the layer index."""
    needed = base.require_family().required_buffer
    if needed is not None and not any(needed in spec.name for spec in specs):
        raise RefusedError(
            f"{base.ref}: the buffer {needed} is not stored, so it would be recomputed from the "
            "new layer indices",
            hint="load the model with transformers and save it again to store the buffer",
        )


def check_out(out: Path, checkpoint: Checkpoint) -> None:
    """Refuse an OUT that is or contains a source model, which --force would delete."""
    source, target = checkpoint.path.resolve(), out.resolve()
    if target in (source, *source.parents):
        raise OutputError(
            f"{out}: is or contains the source model {checkpoint.ref}",
            hint="choose another output directory",
        )


def _dtype_of(specs: Sequence[TensorSpec], base: Checkpoint) -> str | None:
    """Return the dtype to write into config.json, or None if the base's dtype is right."""
    stored = {spec.dtype for spec in specs}
    stated = grown_config.stated_dtype(base.config)
    if all(spec.model == base.ref for spec in specs) or stated is None:
        return None
    if len(stored) > 1:
        raise RefusedError(
            f"dtype: the models are stored in several dtypes: {', '.join(sorted(stored))}",
            hint="set the dtype to write, for example `dtype: bfloat16`",
        )
    dtype = _dtypes.name_of(stored.pop())
    return None if dtype == stated else dtype
