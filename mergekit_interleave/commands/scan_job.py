"""What a worker of a scan needs to begin, and how it loads the model."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.commands.load import built
from mergekit_interleave.commands.scan_plans import Planner
from mergekit_interleave.directive.directive import DTYPES
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    OutOfMemoryError,
    RefusedError,
    Warn,
)
from mergekit_interleave.output import weight_sample
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import allocator, memory_limit
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.measure import Measure
from mergekit_interleave.virtual import sampling, sources

GROUP = 64
"""The number of layouts that are measured together, whose states are in memory."""

BATCH = 1024
"""The number of tokens that are measured together."""


def check_place(dtype: str, device: str | None) -> None:
    """Check where to compute.

    Raises:
        DirectiveError: There is no such dtype or device.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    if dtype not in DTYPES:
        raise DirectiveError(f"--dtype: {dtype!r:.60} is no dtype", hint=f"use {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DirectiveError(
            f"--device: {device!r:.60} cannot be used here: {reason:.120}", hint="use --device cpu"
        ) from error


def to_check(parts: Sequence[Batch]) -> Batch:
    """Return sequences to compare the ways to compute scores on: a long and a short one."""
    return Batch((0, 1), (parts[0].sequences[0], parts[-1].sequences[-1]))


@dataclass(frozen=True)
class Job:
    """What a worker needs to begin.

    Attributes:
        planner: Plans the layouts.
        some: A layout, whose first model is the base of all.
        compared: Layouts to compare the ways to compute scores on.
        checked: Sequences to compare them on.
        dtype: The dtype to compute in.
        device: The device; None for a GPU if there is one.
        digests: The digest of each source model, by its name; None if it is not compared.
        most: The maximum bytes of weights and states; None for any number.
    """

    planner: Planner
    some: str
    compared: Sequence[str]
    checked: Batch
    dtype: str
    device: str | None
    digests: Mapping[str, str] | None
    most: int | None = None

    def start(self, warn: Warn) -> Measure:
        """Load the model, and find out how its layouts can be measured.

        Raises:
            InterleaveError: It cannot be loaded, or is another one on this machine.
        """
        meta_model.hide_bars()
        if self.most is None:
            allocator.keep_freed()
        first = self.planner.of(self.some).first
        device = self.device or _device()
        if self.most is not None:
            memory_limit.check(first, self.dtype, self.most)
        base = self._loaded(first, device)
        sampling.check_predicts(base)
        is_shared = not first.require_family().facts.changes_weights
        loaded = {first.ref: base} if is_shared else {}

        def build(plan: ExpansionPlan) -> Any:
            for ref, checkpoint in plan.sources.items() if is_shared else ():
                if ref not in loaded:
                    loaded[ref] = self._loaded(checkpoint, device, base)
            known = {ref: loaded[ref] for ref in plan.sources if ref in loaded}
            return built(plan, known, dtype=self.dtype, device_map=device, warn=warn)

        measure = Measure(base, first.depth, self.planner.of, build, warn)
        if self.most is not None:
            measure = memory_limit.limited(measure, first, self.most)
        measure.check(self.checked, self.compared)
        return measure

    def _loaded(self, checkpoint: Checkpoint, device: str, like: Any = None) -> Any:
        """Load a source model.

        Raises:
            CheckpointError: It cannot be loaded, which is not a fault of a layout, or is another
                one on this machine.
        """
        if self.digests is not None and digest(checkpoint) != self.digests[str(checkpoint.ref)]:
            machine = platform.node()
            raise CheckpointError(f"{checkpoint.ref}: the machine {machine} has another model")
        try:
            return sources.load_source(checkpoint, self.dtype, device, like).eval()
        except OutOfMemoryError:
            raise
        except RefusedError as error:
            raise CheckpointError(str(error), hint=error.hint) from error


def digests(plans: Iterable[ExpansionPlan]) -> dict[str, str]:
    """Return the digest of each source model, by its name."""
    models = {ref: checkpoint for plan in plans for ref, checkpoint in plan.sources.items()}
    return {str(ref): digest(checkpoint) for ref, checkpoint in models.items()}


def digest(checkpoint: Checkpoint) -> str:
    """Return a digest of a model's config.json and weights."""
    found = hashlib.sha256((checkpoint.path / CONFIG).read_bytes())
    found.update(weight_sample.digest(checkpoint.path).encode())
    return found.hexdigest()


def _device() -> str:
    import torch  # noqa: PLC0415 - takes seconds to import

    return "cuda" if torch.cuda.is_available() else "cpu"
