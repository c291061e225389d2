"""Open source models, each of them once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from mergekit_interleave import _out_files
from mergekit_interleave.checkpoint import adapter, dequantized
from mergekit_interleave.checkpoint.checkpoint import (
    Checkpoint,
    fetch_small_files,
    fetch_weights,
    open_checkpoint,
    unpickled,
)
from mergekit_interleave.checkpoint.hub import fetch_files
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError, UnreachableError
from mergekit_interleave.gguf import model as gguf
from mergekit_interleave.gguf.header import is_gguf
from mergekit_interleave.gguf.model import GgufModel

Source: TypeAlias = Checkpoint | GgufModel
"""A model that layers are taken from. Both kinds have the methods that planning needs."""


@dataclass
class _Cache:
    """The models opened so far, and the errors of those that could not be opened."""

    opened: dict[ModelRef, Checkpoint] = field(default_factory=dict)
    gguf: dict[ModelRef, GgufModel] = field(default_factory=dict)
    failed: dict[tuple[ModelRef, bool], CheckpointError] = field(default_factory=dict)
    unreachable: bool = False


@dataclass(frozen=True)
class Models:
    """Opens source models, each of them once.

    Attributes:
        cached_only: Do not access the network.
        cache_dir: A Hub cache to use instead of the default one.
        trust_remote_code: Whether a model's own code may be run.
        unpickle_into: The directory in which to write pickled weights as safetensors; it need not
            exist yet. If None, pickles are refused.
        dequantize_into: The directory in which to write GGUF files as model directories, for
            transformers; it need not exist yet. If None, they stay GGUF files.
        results: The results of earlier documents of a stream, by name. They are not written yet.
    """

    cached_only: bool = False
    cache_dir: str | None = None
    trust_remote_code: bool = False
    unpickle_into: Path | None = None
    dequantize_into: Path | None = None
    results: Mapping[str, Checkpoint] = field(default_factory=dict)
    _cache: _Cache = field(default_factory=_Cache, repr=False, compare=False)

    def offline(self) -> Models:
        """Return the same models, without network access."""
        return replace(self, cached_only=True)

    def unpickling_into(self, directory: Path) -> Models:
        """Return the same models, with pickled weights allowed.

        Args:
            directory: Where to write them as safetensors; it need not exist yet.
        """
        # A copy of the cache, because models without this option must not see converted weights.
        cache = self._cache
        opened = _Cache(dict(cache.opened), cache.gguf, cache.failed, cache.unreachable)
        return replace(self, unpickle_into=directory, _cache=opened)

    def with_result(self, name: str, result: Checkpoint) -> Models:
        """Return the same models, plus the result of a stream's document under its name."""
        return replace(self, results={**self.results, name: result})

    def open_source(self, ref: ModelRef) -> Source:
        """Open a model directory, a Hub repository or a GGUF file.

        Raises:
            CheckpointError: The model cannot be opened.
        """
        if self.dequantize_into is not None or not is_gguf(ref.path):
            return self.open(ref)
        return self._gguf(ref)

    def _gguf(self, ref: ModelRef) -> GgufModel:
        if ref not in self._cache.gguf:
            self._cache.gguf[ref] = gguf.open_model(ref)
        return self._cache.gguf[ref]

    def open(self, ref: ModelRef) -> Checkpoint:
        """Open a model directory or a Hub repository.

        Raises:
            CheckpointError: The model cannot be opened; repeated calls raise the same error.
            RefusedError: It is a GGUF file.
        """
        if is_gguf(ref.path):
            return self._dequantized(ref)
        result = self.results.get(ref.path)
        if result is not None:
            return replace(result, ref=ref)
        cache = self._cache
        if ref not in cache.opened:
            offline = self.cached_only or cache.unreachable
            key = (ref, offline)
            if key in cache.failed:
                raise cache.failed[key]
            try:
                opened = open_checkpoint(ref, cached_only=offline, cache_dir=self.cache_dir)
            except CheckpointError as error:
                cache.failed[key] = error
                # Detecting that the Hub is unreachable takes half a minute, so do it only once.
                cache.unreachable |= isinstance(error, UnreachableError)
                raise
            cache.opened[ref] = replace(opened, trusted=self.trust_remote_code)
        return cache.opened[ref]

    def _dequantized(self, ref: ModelRef) -> Checkpoint:
        """Return a GGUF file as a model directory.

        Raises:
            RefusedError: That is not wanted, or transformers cannot read the file.
        """
        if self.dequantize_into is None:
            raise RefusedError(
                f"{ref}: is a GGUF file, which this command cannot use",
                hint="name the model's directory, from which the file was converted",
            )
        if ref not in self._cache.opened:
            digest = hashlib.sha256(os.path.abspath(ref.path).encode()).hexdigest()[:16]  # noqa: PTH100 - keeps the name of a link
            place = self.dequantize_into / digest
            dequantized.convert(self._gguf(ref), place)
            opened = open_checkpoint(ModelRef(ModelPath(str(place))))
            self._cache.opened[ref] = replace(opened, ref=ref)
        return self._cache.opened[ref]

    def check_lora(self, ref: ModelRef) -> None:
        """Check that the LoRA of a model exists, if it has one.

        Raises:
            CheckpointError: It does not.
        """
        if ref.lora is not None:
            adapter.check(ref.lora, cached_only=self.cached_only, cache_dir=self.cache_dir)

    def open_if_possible(self, ref: ModelRef) -> Checkpoint | None:
        """Open a model directory or a Hub repository, or return None if that is not possible."""
        found = self.open_source_if_possible(ref)
        return found if isinstance(found, Checkpoint) else None

    def open_source_if_possible(
        self, ref: ModelRef, failed: Callable[[CheckpointError], object] | None = None
    ) -> Source | None:
        """Open a model of any kind, or return None if it cannot be opened.

        Args:
            ref: The model.
            failed: Called with the error if the model cannot be opened.
        """
        try:
            return self.open_source(ref)
        except CheckpointError as error:
            if failed is not None:
                failed(error)
            return None

    def depth_if_known(self, ref: ModelRef) -> int | None:
        """Return the number of layers of a model, or None if it cannot be read."""
        checkpoint = self.open_source_if_possible(ref)
        try:
            return None if checkpoint is None else checkpoint.depth
        except CheckpointError:
            return None

    def fetch_small_files(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Fetch the small files of an opened model.

        Returns:
            The warnings.

        Raises:
            CheckpointError: The files cannot be fetched.
        """
        fetch_small_files(checkpoint, cached_only=self.cached_only, cache_dir=self.cache_dir)
        if not checkpoint.is_local and not any(checkpoint.path.glob("*token*")):
            return (f"{checkpoint.ref}: no tokenizer was found, so none is copied",)
        return ()

    def fetch_card(self, checkpoint: Checkpoint) -> None:
        """Fetch the model card and the interleave.json of an opened model, if it has them.

        The card may state the license, and interleave.json the lineage.
        """
        if not checkpoint.is_local:
            with suppress(CheckpointError):
                fetch_files(
                    checkpoint.pinned,
                    wanted=[_out_files.CARD, _out_files.MANIFEST],
                    cached_only=self.cached_only,
                    cache_dir=self.cache_dir,
                )

    def with_weights(self, ref: ModelRef) -> Checkpoint:
        """Fetch the weights of a model, and convert them from pickles if that is allowed.

        Raises:
            CheckpointError: The weights cannot be fetched or read.
        """
        checkpoint, place = self.open(ref), self.unpickle_into
        fetch_weights(
            checkpoint,
            pickled=place is not None,
            cached_only=self.cached_only,
            cache_dir=self.cache_dir,
        )
        if place is not None:
            checkpoint = unpickled(checkpoint, place / str(len(self._cache.opened)))
            self._cache.opened[ref] = checkpoint
        return checkpoint
