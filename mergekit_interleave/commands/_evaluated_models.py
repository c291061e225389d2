"""Open the two models of an evaluation, and load one after the other."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.commands.load import built
from mergekit_interleave.commands.sample import tokenizer_of
from mergekit_interleave.commands.scan_job import digest
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import DirectiveError, InterleaveError, RefusedError, Warn
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.output import recorded_layout
from mergekit_interleave.planning import public_names
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.virtual import sampling, sources


@dataclass(frozen=True)
class How:
    """How models are loaded.

    Attributes:
        dtype: The dtype to load in; `auto` is the stored one.
        device: The device; None for a GPU if there is one.
        most: The maximum bytes of weights in memory; None for any number.
    """

    dtype: str
    device: str
    most: int | None

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Check that all weights of a model may be in memory.

        Raises:
            RefusedError: They may not.
        """
        size = self._size(checkpoint)
        if self.most is not None and size > self.most:
            raise RefusedError(
                f"{checkpoint.ref}: its weights need {amount(size)}, more than --max-memory, and "
                "the layers of a directive share weights in memory",
                hint="write the model with `run`, and evaluate its directory",
            )

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether all weights of a model may be in memory."""
        return self.most is None or self._size(checkpoint) <= self.most

    def _size(self, checkpoint: Checkpoint) -> int:
        tensors = checkpoint.tensors.values()
        width = {"float32": 4, "float16": 2, "bfloat16": 2}.get(self.dtype)
        if width is None:
            return sum(tensor.nbytes for tensor in tensors)
        return sum(tensor.elements for tensor in tensors) * width


class Evaluated(Protocol):
    """A model that is evaluated."""

    @property
    def name(self) -> str:
        """Its public name."""

    @property
    def dtype(self) -> str:
        """The dtype that it computes in."""

    @property
    def tokenizer(self) -> Checkpoint:
        """The model that its tokenizer comes from."""

    def digest(self) -> str:
        """Return a digest of all that determines its outputs."""

    def loaded(self) -> AbstractContextManager[Any]:
        """Return a context in which the model is in memory."""


@dataclass(frozen=True)
class StoredModel:
    """A model directory, a repository of the Hub or a GGUF file.

    Attributes:
        checkpoint: The model.
        how: How it is loaded.
        is_kept: Whether it stays in memory, for a model that shares its weights.
    """

    checkpoint: Checkpoint
    how: How
    is_kept: bool = False
    _models: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its public name."""
        origin = self.checkpoint.hub_origin
        return origin.path if origin else str(public_names.without_path(self.checkpoint.ref))

    @property
    def dtype(self) -> str:
        """The dtype that it computes in: the stored one, if no other is wanted."""
        config = self.checkpoint.config
        stored = config.get("dtype") or config.get("torch_dtype") or "its stored dtype"
        return str(stored) if self.how.dtype == "auto" else self.how.dtype

    @property
    def tokenizer(self) -> Checkpoint:
        """The model itself."""
        return self.checkpoint

    def digest(self) -> str:
        """Return a digest of config, weights and dtype."""
        return hashlib.sha256(f"{digest(self.checkpoint)} {self.how.dtype}".encode()).hexdigest()

    @contextmanager
    def loaded(self) -> Iterator[Any]:
        """Load the model; weights beyond `How.most` stay on disk."""
        if self.how.fits(self.checkpoint):
            if not self._models:
                self._models.append(self._load())
            yield self._models[0]
            if not self.is_kept:
                self._models.clear()
                gc.collect()
            return
        with scratch_directory() as folder:
            yield _offloaded(self.checkpoint, self.how, folder)
        gc.collect()

    def _load(self) -> Any:
        found = sources.load_source(self.checkpoint, self.how.dtype, {"": self.how.device})
        sampling.check_predicts(found)
        return found.eval()


@dataclass(frozen=True)
class GrownModel:
    """The model of a directive, which shares the tensors of its base.

    Attributes:
        plan: The plan of the model.
        base: The model of its first layer.
        how: How it is loaded.
        warn: Called with each warning.
    """

    plan: ExpansionPlan
    base: StoredModel
    how: How
    warn: Warn

    @property
    def name(self) -> str:
        """A name that says how many layers it has."""
        return f"{self.base.name} with {len(self.plan.layout)} layers"

    @property
    def dtype(self) -> str:
        """The dtype that it computes in, which is that of its base."""
        return self.base.dtype

    @property
    def tokenizer(self) -> Checkpoint:
        """The model that its tokenizer comes from."""
        return self.plan.base

    def digest(self) -> str:
        """Return a digest of the source models and of the layout."""
        known = [digest(checkpoint) for checkpoint in self.plan.sources.values()]
        layout = [fingerprint(self.plan.layout), self.plan.recipe, to_json(self.plan.config())]
        keys = [*layout, self.how.dtype]
        return hashlib.sha256(json.dumps([known, keys]).encode()).hexdigest()

    @contextmanager
    def loaded(self) -> Iterator[Any]:
        """Build the model."""
        first = self.plan.first
        options: dict[str, Any] = {"dtype": self.how.dtype, "device_map": {"": self.how.device}}
        if first.require_family().facts.changes_weights:  # such a model shares no tensor
            yield built(self.plan, {}, **options, warn=self.warn).eval()
            return
        with self.base.loaded() as base:
            yield built(self.plan, {first.ref: base}, warn=self.warn).eval()


def _offloaded(checkpoint: Checkpoint, how: How, folder: Path) -> Any:
    """Load a model of which a part stays on disk.

    Raises:
        RefusedError: transformers cannot load it.
    """
    with meta_model.transformers_errors("load the model", checkpoint.ref):
        config = meta_model.config_of(checkpoint.path, trusted=checkpoint.trusted)
        own_class = meta_model.class_of(config, trusted=checkpoint.trusted)
        place: str | int = "cpu" if how.device == "cpu" else int(how.device.partition(":")[2] or 0)
        found = own_class.from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=how.dtype,
            device_map="auto",
            max_memory={place: how.most},
            offload_folder=str(folder),
        )
    sampling.check_predicts(found)
    return found.eval()


def stored(ref: ModelRef, models: Models, how: How) -> StoredModel:
    """Open a model with its weights.

    Raises:
        CheckpointError: It cannot be opened.
    """
    return StoredModel(models.with_weights(ref), how)


def of_model(
    model: str, base: ModelRef | None, models: Models, how: How
) -> tuple[Evaluated, Evaluated]:
    """Open a stored model and its base.

    Args:
        model: The directory, Hub id or GGUF file of the grown model.
        base: The base; None for the one that the model records.
        models: Opens both.
        how: How they are loaded.

    Raises:
        CheckpointError: One of them cannot be opened.
        DirectiveError: No base is recorded.
    """
    grown = stored(ModelRef(ModelPath(model)), models, how)
    return stored(base or recorded_base(Path(model), models), models, how), grown


def of_directive(
    plan: ExpansionPlan, base: ModelRef | None, models: Models, how: How, warn: Warn
) -> tuple[Evaluated, Evaluated]:
    """Open the source models of a directive, and its base.

    Args:
        plan: The plan of the directive.
        base: The base; None for the model of the first layer.
        models: Opens the models.
        how: How they are loaded.
        warn: Called with each warning.

    Raises:
        CheckpointError: One of them cannot be opened.
        RefusedError: Their weights do not fit in memory.
    """
    how = replace(how, dtype=mergekit_yaml.dtype_of(plan.mergekit) or how.dtype)
    for ref in plan.sources:
        how.check_fits(models.with_weights(ref))
    first = replace(stored(plan.first.ref, models, how), is_kept=True)
    grown = GrownModel(plan, first, how, warn)
    if base is None or base.identity == plan.first.ref.identity:
        return first, grown
    return stored(base, models, how), grown


def recorded_base(model: Path, models: Models) -> ModelRef:
    """Return the base that a model's directory records, if it is available here.

    Raises:
        DirectiveError: None is recorded, there are several, or it is not available.
    """
    try:
        found = recorded_layout.read(model).layout.models if model.is_dir() else ()
    except InterleaveError:
        found = ()
    if len(found) == 1 and models.open_if_possible(found[0]) is not None:
        return found[0]
    reason = "no base is recorded"
    if found:
        names = " and ".join(str(each) for each in found)
        reason = f"it was made of {names}" if len(found) > 1 else f"its base, {names}, is not here"
    raise DirectiveError(f"{model}: {reason}", hint="name the base: --against MODEL")


def check_tokenizers(base: Evaluated, grown: Evaluated, probes: Sequence[str]) -> Any:
    """Check that two models read the same tokens, and return their tokenizer.

    Args:
        base: The base.
        grown: The grown model.
        probes: Texts that both tokenizers encode.

    Raises:
        RefusedError: They do not.
    """
    sizes = [_vocabulary(model.tokenizer) for model in (base, grown)]
    if sizes[0] != sizes[1]:
        raise RefusedError(
            f"{grown.name} has a vocabulary of {sizes[1]:,} tokens, but {base.name} one of "
            f"{sizes[0]:,}"
        )
    one = tokenizer_of(base.tokenizer)
    if base.tokenizer.path == grown.tokenizer.path:
        return one
    other = tokenizer_of(grown.tokenizer)
    special = ("bos_token_id", "eos_token_id")
    if (
        one.get_vocab() != other.get_vocab()
        or any(getattr(one, name) != getattr(other, name) for name in special)
        or any(one(probe).input_ids != other(probe).input_ids for probe in probes)
    ):
        raise RefusedError(f"the tokenizer of {grown.name} differs from that of {base.name}")
    return one


def _vocabulary(checkpoint: Checkpoint) -> int:
    with meta_model.transformers_errors("read the config", checkpoint.ref):
        config = meta_model.config_of(checkpoint.path, trusted=checkpoint.trusted)
    return int(config.get_text_config().vocab_size)
