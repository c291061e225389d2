"""Source models, each opened once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_interleave import _out_files
from mergekit_interleave.checkpoint.checkpoint import (
    Checkpoint,
    fetch_small_files,
    fetch_weights,
    open_checkpoint,
    unpickled,
)
from mergekit_interleave.checkpoint.hub import fetch_files
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import (
    CheckpointError,
    UnreachableError,
)


@dataclass
class _Cache:
    """What has been opened so far."""

    opened: dict[ModelRef, Checkpoint] = field(default_factory=dict)
    failed: dict[tuple[ModelRef, bool], CheckpointError] = field(default_factory=dict)
    unreachable: bool = False


@dataclass(frozen=True)
class Models:
    """Opens source models, each of them once.

    Attributes:
        cached_only: Never ask the network.
        cache_dir: Another Hub cache than huggingface_hub's own.
        trust_remote_code: Whether code that a model brings may be run.
        unpickle_into: The directory in which pickled weights may be written as safetensors; it need
            not exist yet. None refuses pickles.
        results: The results of earlier documents of a stream, by name. None of them is written yet.
    """

    cached_only: bool = False
    cache_dir: str | None = None
    trust_remote_code: bool = False
    unpickle_into: Path | None = None
    results: Mapping[str, Checkpoint] = field(default_factory=dict)
    _cache: _Cache = field(default_factory=_Cache, repr=False, compare=False)

    def offline(self) -> Models:
        """The same models, without asking the network."""
        return replace(self, cached_only=True)

    def unpickling_into(self, directory: Path) -> Models:
        """The same models, with pickled weights allowed.

        Args:
            directory: Where they are written as safetensors; it need not exist yet.
        """
        # A copy of what is opened: these weights are not those of the models without this option.
        opened = _Cache(dict(self._cache.opened), self._cache.failed, self._cache.unreachable)
        return replace(self, unpickle_into=directory, _cache=opened)

    def with_result(self, name: str, result: Checkpoint) -> Models:
        """The same models, and the result of a document of a stream under its name."""
        return replace(self, results={**self.results, name: result})

    def open(self, ref: ModelRef) -> Checkpoint:
        """Open a model.

        Raises:
            CheckpointError: It cannot be opened; the same error each time.
        """
        result = self.results.get(ref.path)
        if result is not None:
            return replace(result, ref=ref)
        cache = self._cache
        if ref not in cache.opened:
            key = (ref, self.cached_only or cache.unreachable)
            if key in cache.failed:
                raise cache.failed[key]
            try:
                opened = open_checkpoint(ref, cached_only=key[1], cache_dir=self.cache_dir)
            except CheckpointError as error:
                cache.failed[key] = error
                # It takes half a minute to find out that the Hub is unreachable: once is enough.
                cache.unreachable |= isinstance(error, UnreachableError)
                raise
            cache.opened[ref] = replace(opened, trusted=self.trust_remote_code)
        return cache.opened[ref]

    def open_if_possible(
        self, ref: ModelRef, failed: Callable[[CheckpointError], object] | None = None
    ) -> Checkpoint | None:
        """Open a model; None where it cannot be opened.

        Args:
            ref: The model.
            failed: Called with the error where it cannot be opened.
        """
        try:
            return self.open(ref)
        except CheckpointError as error:
            if failed is not None:
                failed(error)
            return None

    def depth_if_known(self, ref: ModelRef) -> int | None:
        """The number of layers of a model; None where it cannot be read."""
        checkpoint = self.open_if_possible(ref)
        try:
            return None if checkpoint is None else checkpoint.depth
        except CheckpointError:
            return None

    def fetch_small_files(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Fetch the small files of an opened model.

        Returns:
            What to warn of.

        Raises:
            CheckpointError: They cannot be fetched.
        """
        fetch_small_files(checkpoint, cached_only=self.cached_only, cache_dir=self.cache_dir)
        if not checkpoint.is_local and not any(checkpoint.path.glob("*token*")):
            return (f"{checkpoint.ref}: no tokenizer among its files, or not in the cache",)
        return ()

    def fetch_card(self, checkpoint: Checkpoint) -> None:
        """Fetch the model card of an opened model, which may state its license, if it has one."""
        if not checkpoint.is_local:
            with suppress(CheckpointError):
                fetch_files(
                    checkpoint.pinned,
                    wanted=[_out_files.CARD],
                    cached_only=self.cached_only,
                    cache_dir=self.cache_dir,
                )

    def with_weights(self, ref: ModelRef) -> Checkpoint:
        """Fetch the weights of a model, and read them out of pickles where that is allowed.

        Raises:
            CheckpointError: They cannot be fetched or read.
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
