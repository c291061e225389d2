"""Source models, each opened once."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import suppress
from dataclasses import dataclass, field
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

log = logging.getLogger(__name__)


@dataclass
class Models:
    """Source models, each opened once.

    Attributes:
        cached_only: Never ask the network.
        cache_dir: Another Hub cache than huggingface_hub's own.
        trust_remote_code: Whether code that a model brings may be run.
        unpickle_into: Where pickled weights may be written as safetensors, a directory that can be
            made; None refuses pickles.
        results: What earlier documents of a stream make, by their names; none of it is written yet.
    """

    cached_only: bool = False
    cache_dir: str | None = None
    trust_remote_code: bool = False
    unpickle_into: Path | None = None
    results: dict[str, Checkpoint] = field(default_factory=dict)
    _opened: dict[ModelRef, Checkpoint] = field(default_factory=dict)
    _failed: dict[tuple[ModelRef, bool], CheckpointError] = field(default_factory=dict)
    _unreachable: bool = False

    def open(self, ref: ModelRef) -> Checkpoint:
        """Open a model.

        Raises:
            CheckpointError: It cannot be opened; the same error each time.
        """
        result = self.results.get(ref.path)
        if result is not None:
            return dataclasses.replace(result, ref=ref)
        if ref not in self._opened:
            how = (ref, self.cached_only or self._unreachable)
            if how in self._failed:
                raise self._failed[how]
            try:
                opened = open_checkpoint(ref, cached_only=how[1], cache_dir=self.cache_dir)
            except CheckpointError as error:
                self._failed[how] = error
                # Which takes half a minute to be sure of: once is enough.
                self._unreachable |= isinstance(error, UnreachableError)
                raise
            self._opened[ref] = dataclasses.replace(opened, trusted=self.trust_remote_code)
        return self._opened[ref]

    def place(self, ref: ModelRef) -> Path:
        """Where a model is, or what it is called where it cannot be opened."""
        try:
            return self.open(ref).path
        except CheckpointError:
            return Path(str(ref))

    def fetch_small_files(self, checkpoint: Checkpoint) -> None:
        """Fetch the small files of an opened model.

        Raises:
            CheckpointError: They cannot be had.
        """
        fetch_small_files(checkpoint, cached_only=self.cached_only, cache_dir=self.cache_dir)
        if not checkpoint.is_local and not any(checkpoint.path.glob("*token*")):
            log.warning("%s: no tokenizer among its files, or not in the cache", checkpoint.ref)

    def fetch_card(self, checkpoint: Checkpoint) -> None:
        """Fetch the model card of an opened model, which may tell its license; it may have none."""
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
            CheckpointError: They cannot be had.
        """
        checkpoint, place = self.open(ref), self.unpickle_into
        fetch_weights(
            checkpoint,
            pickled=place is not None,
            cached_only=self.cached_only,
            cache_dir=self.cache_dir,
        )
        if place is not None:
            checkpoint = unpickled(checkpoint, place / str(len(self._opened)))
            self._opened[ref] = checkpoint
        return checkpoint
