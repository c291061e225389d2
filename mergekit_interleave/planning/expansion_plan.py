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

from mergekit_interleave import _dtypes
from mergekit_interleave.checkpoint import adapter, extra_files
from mergekit_interleave.checkpoint.checkpoint import Checkpoint, config_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import OutputError, RefusedError, Warn, collected_warnings
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import (
    compatibility,
    grown_config,
    legacy_config,
    llama_cpp,
    zeroing,
)
from mergekit_interleave.planning.client_warnings import client_warnings
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
        legacy: Whether config.json and the tokenizer are also written for transformers 4.
        forced: The settings in which models of a forced stack differ, one clause each.
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
    legacy: bool = False
    forced: tuple[str, ...] = ()

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
            self.expansion.layout,
            self.mergekit,
            self.public,
            self.expansion.modules,
            self.expansion.architectures,
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
        if mergekit_yaml.changes_vocabulary(self.mergekit) and spec.layer is None:
            rows = self.sources[spec.model].vocabulary
            return TOKENIZER if rows is None or spec.shape[:1] == (rows,) else None
        return None

    @property
    def conversion(self) -> str | None:
        """The dtype conversions, such as `F32 → BF16`; None if no tensor is converted."""
        changed = {" → ".join(spec.dtypes) for spec in self.specs if len(spec.dtypes) > 1}
        return ", ".join(sorted(changed)) or None

    def config(self, vocab_size: int | None = None) -> dict[str, Any]:
        """Return the config.json of the result."""
        config = self.grown.config(self.base.config, dtype=self.dtype, vocab_size=vocab_size)
        return legacy_config.readable(config) if self.legacy else config

    @property
    def client_warnings(self) -> tuple[str, ...]:
        """Warnings of programs that misread the result."""
        directive = self.expansion.directive
        return client_warnings(self.grown, self.base, directive, legacy=self.legacy)

    @property
    def keeps_period(self) -> str | None:
        """The nearest directive that llama.cpp computes alike, if it misreads this layout."""
        return llama_cpp.alternative(self.grown, self.expansion.directive)

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
            if content is not None and self.legacy:
                content = legacy_config.readable_file(name, content)
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
        return (
            zeroing.adds_only(self.identities, self.layout, self.first.depth)
            and not self.uses_lora
            and not mergekit_yaml.changes_tokenizer(self.mergekit)
            and all(spec.scale in (None, 1) for spec in self.specs if spec.layer is None)
        )


def vocab_size(result: Checkpoint) -> int:
    """Return the number of rows of the embeddings that mergekit made for another tokenizer.

    Args:
        result: The result.

    Raises:
        RefusedError: It is unknown which tensor holds the embeddings.
    """
    rows = result.vocabulary
    if rows is None:
        raise RefusedError(
            f"it is unknown which tensor of model type {result.model_type} holds the embeddings"
        )
    return rows


def plan_expansion(  # noqa: PLR0913 - the options of `run` that change the plan
    expansion: Expansion,
    models: Models,
    out: Path | None,
    *,
    base_model: str | None = None,
    mix: bool = False,
    legacy: bool = False,
) -> ExpansionPlan:
    """Plan the result of an expansion.

    Args:
        expansion: The directive and its layout.
        models: Fetches the files of the source models.
        out: The absolute path of the result; None if nothing will be written.
        base_model: The Hub id of the only source model, if its directory does not state one.
        mix: Stack models even if they are not compatible.
        legacy: Write config.json and the tokenizer also for transformers 4.

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
        layout = mergekit_yaml.effective(expansion.layout, keys)
        grown = grown_config.grow(sources, layout)
        dtypes = Dtypes(*mergekit_yaml.dtypes_of(keys))
        specs = assemble(layout, sources, dtypes, grown.placement.kv_sharing_layers)
        _check_needed(specs, base)
        forced = _forced(expansion, opened) if mix and out is not None else ()
        warnings += [f"the stack is forced, although {clause}" for clause in forced]
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
            legacy=legacy,
            forced=forced,
        )


def _forced(expansion: Expansion, opened: Sources) -> tuple[str, ...]:
    """Return the settings for which a stack would be refused, one clause each."""
    ends = _ends(expansion)
    keys = expansion.directive.mergekit
    title = opened.public.title
    return tuple(
        f"{found.key} is {found.of_model!r:.100} in {title(model.ref)} and "
        f"{found.of_base!r:.100} in {title(opened.base.ref)}"
        for model in opened.models.values()
        if model.path.resolve() != opened.base.path.resolve()
        for found in compatibility.mismatches(
            model,
            opened.base,
            is_end=model.ref in ends,
            new_vocabulary=mergekit_yaml.changes_vocabulary(keys),
        )
    )


def _ends(expansion: Expansion) -> set[ModelRef]:
    """Return the models of the first and of the last layer."""
    slices = expansion.layout.slices
    return {slices[0].model, slices[-1].model}


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
    """Open the source models and check, without their weights, what can be checked.

    Args:
        expansion: The directive and its layout.
        models: Opens the models that `resolve` did not open.
        base_model: The Hub id of the only source model, if its directory does not state one.
        mix: Stack models even if they are not compatible.

    Raises:
        InterleaveError: A model cannot be opened, or the models are not compatible.
    """

    def opened_by(model: ModelRef) -> Checkpoint:
        return expansion.checkpoints.get(model) or models.open(model)

    sources = {model: opened_by(model) for model in expansion.layout.models}
    base = opened_by(expansion.base)
    opened = {**sources, base.ref: base}
    for checkpoint in sources.values():
        _check_adapter(checkpoint)
    if not mix:
        ends, keys = _ends(expansion), expansion.directive.mergekit
        for model in opened.values():
            _check_fit(
                model,
                base,
                is_end=model.ref in ends,
                new_vocabulary=mergekit_yaml.changes_vocabulary(keys),
            )
    return Sources(sources, base, PublicNames.of(opened, base_model))


def _check_fit(model: Checkpoint, base: Checkpoint, *, is_end: bool, new_vocabulary: bool) -> None:
    """Check that the layers of a model can be stacked on those of the base."""
    base.require_family()
    model.require_family()
    if model.path.resolve() == base.path.resolve():
        return
    found = compatibility.mismatch(model, base, is_end=is_end, new_vocabulary=new_vocabulary)
    if found is None:
        return
    hint = None
    if found.only_ends:
        union = ", or set `tokenizer_source: union`" if found.only_rows else ""
        hint = f"take the first and the last layer from one model{union}"
    elif found.same_shapes:
        hint = "`mk-interleave run --mergekit allow_crimes=true` stacks them anyway"
    raise RefusedError(
        f"{model.ref} cannot be stacked with {base.ref}: {found.key} is {found.of_model!r} in "
        f"{model.ref} and {found.of_base!r} in {base.ref}",
        hint=hint,
    )


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
    if adapter.is_adapter(checkpoint.path):
        raise RefusedError(
            f"{checkpoint.ref}: has an adapter, {adapter.CONFIG}, which transformers loads "
            "with the model, but whose layers cannot be grown",
            hint=f"merge the adapter into the weights with PEFT, or remove {adapter.CONFIG} "
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
    stored = {spec.dtype for spec in specs if _dtypes.is_float(spec.dtype)}
    stated = grown_config.stated_dtype(base.config)
    if all(spec.model == base.ref for spec in specs) or stated is None or not stored:
        return None
    if len(stored) > 1:
        raise RefusedError(
            f"dtype: the models are stored in several dtypes: {', '.join(sorted(stored))}",
            hint="set the dtype to write, for example `dtype: bfloat16`",
        )
    dtype = _dtypes.name_of(stored.pop())
    return None if dtype == stated else dtype
