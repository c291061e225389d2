"""Plan an expansion before anything is written: its sources, every tensor, config and file.

Cheap checks come before anything is fetched, and everything is checked before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave.architectures import compatibility
from mergekit_interleave.checkpoint import extra_files
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
"""Why embeddings and head cannot be compared."""


@dataclass(frozen=True)
class ExpansionPlan:
    """What is to be made.

    Attributes:
        expansion: The directive and its layout.
        sources: The models whose layers are taken.
        base: The model that gives config, tokenizer and small files.
        public: The public names of the models.
        grown: The config.json of the layout.
        specs: Every tensor of the result.
        dtype: The dtype to state in config.json, where it is not the base's.
        small_files: The base's files to carry, by their names below it.
        warnings: What to beware of, those of the expansion included.
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
        """What config.json must say of single layers."""
        return self.grown.placement

    @property
    def mergekit(self) -> Mapping[str, object]:
        """Mergekit's own keys of the directive."""
        return self.expansion.directive.mergekit

    @cached_property
    def layout(self) -> Layout:
        """The layers, with the scales that mergekit's top-level parameters give them."""
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
        """How many numbers the result holds."""
        return sum(math.prod(spec.shape) for spec in self.specs)

    @property
    def uses_lora(self) -> bool:
        """Whether a LoRA is merged into a source first."""
        return any(model.lora for model in self.sources)

    def reason_unread(self, spec: TensorSpec) -> str | None:
        """Why a tensor of the result cannot be compared with its source, None where it can."""
        if spec.model.lora is not None:
            return "a LoRA was merged into it"
        rows = (self._vocabulary,) if self._vocabulary else spec.shape[:1]
        if mergekit_yaml.changes_vocabulary(self.mergekit) and spec.layer is None:
            return TOKENIZER if spec.shape[:1] == rows else None
        return None

    @cached_property
    def _vocabulary(self) -> int | None:
        """The rows of the base's embeddings, where it is known which tensor holds them."""
        tensors = self.first.tensors
        names = [name for name in self.first.require_family().before_layers if name in tensors]
        return tensors[names[0]].shape[0] if names else None

    @property
    def conversion(self) -> str | None:
        """From which dtypes to which any tensor is converted, if one is."""
        changed = {" → ".join(spec.dtypes) for spec in self.specs if len(spec.dtypes) > 1}
        return ", ".join(sorted(changed)) or None

    def config(self, vocab_size: int | None = None) -> dict[str, Any]:
        """config.json of the result."""
        return self.grown.config(self.base.config, dtype=self.dtype, vocab_size=vocab_size)

    def carried(self, warn: Warn) -> Iterator[tuple[str, bytes]]:
        """The small files of the result: their names below it, and what they hold.

        Args:
            warn: Called with each warning.

        Raises:
            CheckpointError: One cannot be read, or holds what its kind does not have.
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
        """Whether the result computes what its base computes, conversion apart."""
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
    """The rows of the embeddings that mergekit made for another tokenizer.

    Args:
        tensors: Those of the result.
        plan: What was to be made.

    Raises:
        RefusedError: It is not known which tensor holds them.
    """
    before = plan.first.require_family().before_layers
    if not before or before[0] not in tensors:
        raise RefusedError("which tensor holds the embeddings of this model type is not known")
    return tensors[before[0]].shape[0]


def plan_expansion(
    expansion: Expansion,
    models: Models,
    out: Path | None,
    *,
    base_model: str | None = None,
    mix: bool = False,
) -> ExpansionPlan:
    """Plan what is to be made.

    Args:
        expansion: The directive and its layout.
        models: Fetches the files of the source models.
        out: Where the result is to appear, absolute; None where it is not to appear.
        base_model: The Hub id of the only source model, where its directory does not tell.
        mix: Stack models although they do not fit.

    Raises:
        InterleaveError: It cannot be made.
    """
    with collected_warnings() as warnings:
        warnings.extend(expansion.warnings)
        models = models_for(expansion.directive, models)
        keys = expansion.directive.mergekit
        opened = open_sources(expansion, models, base_model=base_model, mix=mix)
        base = opened.base
        if out is not None:
            for checkpoint in (*opened.models.values(), base):
                _check_apart(checkpoint, out)
            warnings.extend(models.fetch_small_files(base))
            for checkpoint in opened.models.values():
                models.fetch_card(checkpoint)
        sources = {model: models.with_weights(model) for model in opened.models}
        base = sources.get(base.ref, base)
        for checkpoint in sources.values():
            checkpoint.check_depth()
            _check_metadata(checkpoint)
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
    """The source models, which fit one another.

    Attributes:
        models: Those whose layers are taken.
        base: The one that gives config, tokenizer and small files.
        public: Their public names.
    """

    models: Mapping[ModelRef, Checkpoint]
    base: Checkpoint
    public: PublicNames

    def grow(self, expansion: Expansion) -> GrownConfig:
        """The config.json of an expansion, as far as the configs of its sources tell."""
        keys = expansion.directive.mergekit
        return grown_config.grow(self.models, mergekit_yaml.effective(expansion.layout, keys))


def open_sources(
    expansion: Expansion, models: Models, *, base_model: str | None = None, mix: bool = False
) -> Sources:
    """Check that the source models fit, as far as their configs tell.

    Args:
        expansion: The directive and its layout.
        models: Opens those that `resolve` left out.
        base_model: The Hub id of the only source model, where its directory does not tell.
        mix: Stack models although they do not fit.

    Raises:
        InterleaveError: They cannot be opened, or do not fit.
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
    """Only for some types it is known what several models must agree in."""
    directories = {checkpoint.path.resolve() for checkpoint in opened.values()}
    if len(directories) > 1 and base.require_family().must_agree is None:
        raise RefusedError(f"several models of type {base.model_type} cannot be stacked yet")


def _check_fit(model: Checkpoint, base: Checkpoint, *, mix: bool) -> None:
    family = base.require_family()
    if model.require_family().layer_prefix != family.layer_prefix or (
        model.model_type != base.model_type and not mix
    ):
        found: tuple[str, object, object] | None = ("type", model.model_type, base.model_type)
    else:
        with config_errors(model.path):
            found = None if mix else compatibility.disagreement(model.config, base.config, family)
    if found is not None:
        key, ours, theirs = found
        raise RefusedError(
            f"{model.ref} does not fit {base.ref}: {key} is {ours!r}, not {theirs!r}",
            hint="--mergekit allow_crimes=true to insist",
        )


def _check_metadata(checkpoint: Checkpoint) -> None:
    """What a header says besides its tensors is carried along, if it is true of the result, too."""
    for shard in {tensor.shard for tensor in checkpoint.tensors.values()}:
        for key, value in shard.metadata.items():
            if checkpoint.names_a_layer(key) or checkpoint.names_a_layer(value):
                raise RefusedError(
                    f"{shard.file}: its header says more of single layers than their tensors "
                    f"({key!r}), as some quantizers' do, and nothing says that of a new layer",
                    hint="load the model without quantization, and grow that",
                )


def _check_needed(specs: Sequence[TensorSpec], base: Checkpoint) -> None:
    """Some tensors, where they are not stored, are computed from the index of their layer."""
    needed = base.require_family().required_buffer
    if needed is not None and not any(needed in spec.name for spec in specs):
        raise RefusedError(
            f"{base.ref}: its tensors lack {needed}, which would be computed anew for the new "
            "indices of its layers",
            hint="load the model with transformers and save it again, which stores them",
        )


def _check_apart(checkpoint: Checkpoint, out: Path) -> None:
    """OUT is no source model and holds none, which --force would destroy."""
    source = checkpoint.path.resolve()
    place = out.resolve()
    if place == source or place in source.parents:
        raise OutputError(f"{out}: is, or holds, the source model {checkpoint.ref}")


def _dtype_of(specs: Sequence[TensorSpec], base: Checkpoint) -> str | None:
    """The dtype to state where the base's config does not speak for all the weights."""
    stored = {spec.dtype for spec in specs}
    stated = grown_config.stated_dtype(base.config)
    if all(spec.model == base.ref for spec in specs) or stated is None:
        return None
    if len(stored) > 1:
        raise RefusedError(
            f"the models are stored in several dtypes: {', '.join(sorted(stored))}",
            hint="state the one to write: `dtype: bfloat16`",
        )
    found = _dtypes.name_of(stored.pop())
    return None if found == stated else found
