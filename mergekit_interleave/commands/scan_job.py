"""What every search of layouts starts from: a loaded model, and sequences to score."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import read_text
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.meta_model import hide_bars
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.commands.load import built
from mergekit_interleave.directive.directive import DTYPES
from mergekit_interleave.errors import CheckpointError, DirectiveError, Warn
from mergekit_interleave.output import weight_sample
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import memory_limit, sequences
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.measure import Measure
from mergekit_interleave.scanning.sequences import ScoredTokens
from mergekit_interleave.virtual import sampling, sources

GROUP = 64
"""The number of layouts that are measured together, whose states are in memory."""

BATCH = 1024
"""The number of tokens that are measured together."""

_WINDOW = 128
"""The number of tokens of a window of text."""


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


def scored_sequences(
    tokenizer: Any, text: StrPath | None, items: StrPath | None, most: int, first: Checkpoint
) -> list[ScoredTokens]:
    """Return the sequences of the text and of the items."""
    positions = first.layer_config.get("max_position_embeddings")
    positions = positions if isinstance(positions, int) else None
    found: list[ScoredTokens] = []
    if text is not None or items is None:
        content, where = (
            sequences.default_text() if text is None else (read_text(Path(text)), str(text))
        )
        length = min(_WINDOW, positions or _WINDOW)
        found += sequences.of_text(tokenizer, content, where, most_tokens=most, length=length)
    if items is not None:
        found += sequences.of_items(tokenizer, Path(items), positions)
    return found


def to_check(parts: Sequence[Batch]) -> Batch:
    """Return sequences to compare the ways to compute scores on: a long and a short one."""
    return Batch((0, 1), (parts[0].sequences[0], parts[-1].sequences[-1]))


@dataclass(frozen=True)
class Job:
    """What a worker needs to begin.

    Attributes:
        plans: The plan of each layout.
        dtype: The dtype to compute in.
        device: The device; None for a GPU if there is one.
        checked: Sequences to compare the ways to compute scores on.
        digest: The digest of the weights; None if it is not compared.
        most: The maximum bytes of weights and states; None for any number.
    """

    plans: Sequence[ExpansionPlan]
    dtype: str
    device: str | None
    checked: Batch
    digest: str | None
    most: int | None = None

    def start(self, warn: Warn) -> Measure:
        """Load the model, and find out how its layouts can be measured.

        Raises:
            InterleaveError: It cannot be loaded, or is another one on this machine.
        """
        hide_bars()
        first = self.plans[0].first
        if self.digest is not None and weight_sample.digest(first.path) != self.digest:
            raise CheckpointError(f"{first.ref}: the machine {platform.node()} has another model")
        device = self.device or _device()
        if self.most is not None:
            memory_limit.check(first, self.dtype, self.most)
        base = sources.load_source(first, self.dtype, device)
        sampling.check_predicts(base)
        base.eval()
        is_shared = not first.require_family().facts.changes_weights

        def build(plan: ExpansionPlan) -> Any:
            known = {plan.first.ref: base} if is_shared else {}
            return built(plan, known, dtype=self.dtype, device_map=device, warn=warn)

        measure = Measure(base, self.plans, build)
        if self.most is not None:
            measure = memory_limit.limited(measure, first, self.most)
        measure.check(self.checked)
        if measure.reason is not None:
            warn(f"each layout is built as a model of its own, which is slower: {measure.reason}")
        return measure


def _device() -> str:
    import torch  # noqa: PLC0415 - takes seconds to import

    return "cuda" if torch.cuda.is_available() else "cpu"
