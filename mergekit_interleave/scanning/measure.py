"""Measure the scores of layouts: layer by layer where that is right, else model by model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import likelihood, paths
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.layer_major import LayerMajor, NotLayerMajorError
from mergekit_interleave.scanning.paths import Path, Step
from mergekit_interleave.scanning.results import Floats

TOLERANCE = 1e-4
"""The largest difference in nats of two scores in float32 that count as equal."""

Build = Callable[[ExpansionPlan], Any]
"""Builds the model of a plan in memory, with the layers of the loaded base."""


@dataclass
class Measure:
    """Measures the scores of the layouts of one loaded base.

    Attributes:
        base: The base.
        plans: The plan of each layout.
        build: Builds the model of a plan.
        reason: Why layouts are not measured layer by layer, as a clause; None if they are.
    """

    base: Any
    plans: Sequence[ExpansionPlan]
    build: Build
    reason: str | None = None
    _edited: dict[Step, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """The number of layers of the base."""
        return self.plans[0].first.depth

    def check(self, batch: Batch, rows: Sequence[int]) -> None:
        """Find out whether the scores of models that are computed layer by layer are right.

        Args:
            batch: Sequences to compare them on.
            rows: The layouts to compare; the base is always compared.
        """
        wanted = {row: self._path(row) for row in rows if self._is_simple(row)}
        try:
            found = self._layer_major.scores(batch, {-1: self._base_path, **wanted})
        except NotLayerMajorError as error:
            self.reason = str(error)
            return
        apart = self._apart(found[-1], likelihood.scores(self.base, batch))
        if apart:
            self.reason = f"scores of the base would be {apart:.1g} nats apart"
        for row in wanted:
            apart = self._apart(found[row], likelihood.scores(self.build(self.plans[row]), batch))
            if apart and self.reason is None:
                self.reason = f"scores of a layout would be {apart:.1g} nats apart"

    def _apart(self, one: Sequence[float], other: Sequence[float]) -> float:
        """Return the largest difference of scores; 0 if it is that of rounding."""
        import torch  # noqa: PLC0415 - takes seconds to import

        rounding = torch.finfo(self.base.dtype).eps / torch.finfo(torch.float32).eps
        apart = np.abs(np.subtract(one, other))
        return 0.0 if (apart <= TOLERANCE * rounding).all() else float(np.nanmax(apart))

    def base_scores(self, batch: Batch) -> Floats:
        """Return the scores of the base, of shape (1, sequences)."""
        if self.reason is not None:
            return np.array([likelihood.scores(self.base, batch)])
        return np.array([self._layer_major.scores(batch, {0: self._base_path})[0]])

    def scores(self, rows: Sequence[int], batch: Batch) -> Floats:
        """Return the scores of some layouts, of shape (rows, sequences).

        Args:
            rows: The numbers of the layouts.
            batch: The sequences.
        """
        simple = [row for row in rows if self.reason is None and self._is_simple(row)]
        found: dict[int, list[float]] = {}
        if simple:
            found = self._layer_major.scores(batch, {row: self._path(row) for row in simple})
        for row in rows:
            if row not in found:
                found[row] = likelihood.scores(self.build(self.plans[row]), batch)
        return np.array([found[row] for row in rows])

    @cached_property
    def _layer_major(self) -> LayerMajor:
        return LayerMajor(self.base, self._edited)

    @property
    def _base_path(self) -> Path:
        return tuple(Step(index) for index in range(self.depth))

    def _is_simple(self, row: int) -> bool:
        """Whether a layout has only layers of the base, and everything else is the base's."""
        plan = self.plans[row]
        return len(plan.layout.models) == 1 and not plan.mergekit

    def _path(self, row: int) -> Path:
        """Return the path of a layout; its edited layers are built."""
        plan = self.plans[row]
        path = paths.path_of(plan.layout)
        missing = {step for step in path if step.edit and step not in self._edited}
        if missing:
            grown = self.build(plan)
            names = [name for name, _ in grown.named_parameters(remove_duplicate=False)]
            (stack,) = layer_names.stacks_of(names, len(path), grown.config.to_dict())
            for index, step in enumerate(path):
                if step in missing:
                    self._edited[step] = grown.get_submodule(f"{stack}.{index}")
        return path
