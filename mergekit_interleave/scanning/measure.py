"""Measure the scores of layouts: layer by layer where that is right, else model by model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.errors import InterleaveError, OutOfMemoryError, RefusedError, Warn
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import likelihood, paths
from mergekit_interleave.scanning.batches import Batch, by_length
from mergekit_interleave.scanning.layer_major import LayerMajor, NotLayerMajorError
from mergekit_interleave.scanning.paths import Path, Step
from mergekit_interleave.scanning.results import Floats
from mergekit_interleave.virtual.model import layers_of
from mergekit_interleave.virtual.sampling import check_vocabulary

TOLERANCE = 1e-4
"""The largest difference in nats of two scores in float32 that count as equal. In another dtype it
grows with the square root of the rounding error."""

Build = Callable[[ExpansionPlan], Any]
"""Builds the model of a plan in memory, with the layers of the loaded base."""


@dataclass
class Measure:
    """Measures the scores of the layouts of one loaded base.

    Attributes:
        base: The base.
        plans: The plan of each layout.
        build: Builds the model of a plan.
        warn: Called with each warning.
        reason: Why layouts are not measured layer by layer, as a clause; None if they are.
        pads: Whether a shorter sequence is padded to be measured with a longer one.
        at_work: Returns a context in which a layer of the base can be applied.
        most: The maximum bytes of states and logits; None for any number.
    """

    base: Any
    plans: Sequence[ExpansionPlan]
    build: Build
    warn: Warn = lambda _: None
    reason: str | None = None
    pads: bool = True
    at_work: Callable[[Any], AbstractContextManager[object]] = nullcontext
    most: int | None = None
    _edited: dict[Step, Any] = field(default_factory=dict)
    _built: dict[int, Any] = field(default_factory=dict)
    _group: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """The number of layers of the base."""
        return self.plans[0].first.depth

    def check(self, batch: Batch) -> None:
        """Find out how layouts can be measured, and set `reason` and `pads`.

        Args:
            batch: Sequences to compare on: what is computed layer by layer with whole models, for
                the base and for few layouts that show each layer; what is computed with padding
                with what is computed without.

        Raises:
            DirectiveError: The model has not as many tokens as the tokenizer.
        """
        check_vocabulary(self.base, np.array(batch.rows()))
        self.pads = self._may_pad(batch)
        try:
            fault = self._fault(batch)
        except OutOfMemoryError:
            raise
        except RefusedError as error:
            fault = f"`run` refuses some of them, for example: {error}"
        except NotLayerMajorError as error:
            fault = str(error)
        if fault is not None:
            self._fall_back(fault)

    def _fall_back(self, reason: str) -> None:
        self.reason = reason
        self.warn(f"each layout is built as a model of its own, which is slower: {reason}")

    def _may_pad(self, batch: Batch) -> bool:
        """Whether padding changes no score; in other dtypes than float32, rounding hides it."""
        import torch  # noqa: PLC0415 - takes seconds to import

        return self.base.dtype == torch.float32 and not any(
            self._apart(row, self._alone(self.base, part))
            for mixed in (batch, _mixed(batch))
            for row, part in _compared(mixed, self._alone(self.base, mixed))
        )

    def _alone(self, model: Any, batch: Batch) -> list[float]:
        return likelihood.scores(model, batch, most=self.most)

    def _fault(self, batch: Batch) -> str | None:
        """Return what is wrong if layouts are measured layer by layer; None if nothing is.

        Raises:
            NotLayerMajorError: They cannot be.
            RefusedError: A layout cannot be built.
        """
        simple = {
            row: paths.path_of(plan.layout)
            for row, plan in enumerate(self.plans)
            if self._is_simple(row)
        }
        _tried(lambda: self._layer_major.check(batch))
        wanted = {row: self._path(row) for row in paths.covering(simple)}
        with_base = {-1: self._base_path, **wanted}
        part = next(part for _, part in self.parts(batch))
        found = _tried(lambda: self._layer_major.scores(part, with_base))
        apart = self._apart(found[-1], self._alone(self.base, part))
        if apart:
            return f"scores of the base would be {apart:.1g} nats apart"
        for row in wanted:
            apart = self._apart(found[row], self._alone(self.build(self.plans[row]), part))
            if apart:
                return f"scores of a layout would be {apart:.1g} nats apart"
        return None

    def _apart(self, one: Sequence[float], other: Sequence[float]) -> float:
        """Return the largest difference of scores; 0 if it is that of rounding."""
        import torch  # noqa: PLC0415 - takes seconds to import

        rounding = torch.finfo(self.base.dtype).eps / torch.finfo(torch.float32).eps
        most = TOLERANCE * max(rounding, 1.0) ** 0.5
        if np.isclose(one, other, rtol=0, atol=most, equal_nan=True).all():
            return 0.0
        with np.errstate(invalid="ignore"):
            return float(np.nan_to_num(np.abs(np.subtract(one, other)), nan=np.inf).max())

    def base_scores(self, batch: Batch) -> Floats:
        """Return the scores of the base, of shape (1, sequences)."""
        fast = {-1: self._base_path} if self.reason is None else {}
        return self._measured([-1], batch, fast)

    def scores(self, rows: Sequence[int], batch: Batch) -> Floats:
        """Return the scores of some layouts, of shape (rows, sequences).

        The scores of a layout that `run` refuses, which only shows when it is built, are -inf.

        Args:
            rows: The numbers of the layouts.
            batch: The sequences.
        """
        fast: dict[int, Path] = {}
        if self._group != tuple(rows):  # else it is the next batch of the same layouts
            self._group = tuple(rows)
            self._built.clear()
            if self.most is not None:
                self._edited.clear()
        for row in rows:
            if self.reason is None and self._is_simple(row):
                with self._unless_refused():
                    fast[row] = self._path(row)
        return self._measured(rows, batch, fast)

    def _measured(self, rows: Sequence[int], batch: Batch, fast: Mapping[int, Path]) -> Floats:
        """Return scores; those of `fast` are computed layer by layer."""
        check_vocabulary(self.base, np.array(batch.rows()))
        found = np.full((len(rows), len(batch.sequences)), -np.inf)
        parts = [*self.parts(batch)]
        try:
            for places, part in parts if fast else ():
                own = self._layer_major.scores(part, fast)
                of_fast = [rows.index(row) for row in fast]
                found[np.ix_(of_fast, places)] = [own[row] for row in fast]
        except NotLayerMajorError as error:
            self._fall_back(str(error))
            fast = {}
        for at, row in enumerate(rows):
            if row not in fast:
                with self._unless_refused():
                    model = self.base if row < 0 else self._model(row)
                    for places, part in parts:
                        found[at, places] = self._alone(model, part)
        return found

    def _model(self, row: int) -> Any:
        """Return the model of a layout; it is kept for the next batch if it shares all weights."""
        if row in self._built:
            return self._built[row]
        plan = self.plans[row]
        model = self.build(plan)
        is_edited = any(layer.edit for layer in plan.layout.layers)
        if not is_edited and not plan.first.require_family().facts.changes_weights:
            self._built[row] = model
        return model

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Leave the block where a layout is refused when it is built."""
        try:
            yield
        except OutOfMemoryError:
            raise
        except RefusedError as error:
            self.warn(f"a layout has no score, because `run` refuses it: {error}")

    def parts(self, batch: Batch) -> Iterator[tuple[list[int], Batch]]:
        """Yield what is computed at once, with the places of its sequences in the batch."""
        if self.pads:
            yield [*range(len(batch.sequences))], batch
        else:
            yield from by_length(batch)

    @cached_property
    def _layer_major(self) -> LayerMajor:
        return LayerMajor(self.base, self.depth, self._edited, self.at_work, self.most)

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
            (layers,) = layers_of(grown, len(path)).values()
            for layer, step in zip(layers, path, strict=True):
                if step in missing:
                    self._edited[step] = layer
        return path


def _tried(compute: Callable[[], Any]) -> Any:
    """Compute something layer by layer.

    Raises:
        NotLayerMajorError: It cannot be computed.
    """
    with meta_model.memory_errors():
        try:
            return compute()
        except (NotLayerMajorError, InterleaveError, MemoryError):
            raise
        except Exception as error:  # whatever the code of a model raises
            if "memory" in str(error).lower():
                raise
            words = " ".join(str(error).split())[:100]
            raise NotLayerMajorError(
                f"the layers cannot be applied one by one ({words})"
            ) from error


def _mixed(batch: Batch) -> Batch:
    """Return the longest sequence with its beginnings, as a batch."""
    longest = max(batch.sequences, key=lambda each: len(each.tokens))
    lengths = {max(len(longest.tokens) // parts, 2) for parts in (1, 2, 4)}
    cut = tuple(replace(longest, tokens=longest.tokens[:length], start=1) for length in lengths)
    return Batch(tuple(range(len(cut))), cut)


def _compared(batch: Batch, scores: Sequence[float]) -> Iterator[tuple[list[float], Batch]]:
    """Yield the sequences of each length as a batch, with their scores."""
    for places, part in by_length(batch):
        yield [scores[place] for place in places], part
