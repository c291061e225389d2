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
from mergekit_interleave.scanning.sequences import ScoredTokens
from mergekit_interleave.virtual.model import layers_of
from mergekit_interleave.virtual.sampling import check_vocabulary

TOLERANCE = 1e-4
"""The largest difference in nats of two scores in float32 that count as equal. In another dtype it
grows with the square root of the rounding error."""

Build = Callable[[ExpansionPlan], Any]
"""Builds the model of a plan in memory, with the layers of the loaded base."""


def to_compare(plans: Mapping[str, ExpansionPlan]) -> list[str]:
    """Return few layouts that show each layer in each way in which the others use it.

    Args:
        plans: The plan of each layout, by its directive.
    """
    layouts = [*plans]
    simple = {
        row: paths.path_of(plans[layout].layout)
        for row, layout in enumerate(layouts)
        if _is_simple(plans[layout])
    }
    return [layouts[row] for row in paths.covering(simple)]


def _is_simple(plan: ExpansionPlan) -> bool:
    """Whether a layout has only layers of the base, and everything else is the base's."""
    return len(plan.layout.models) == 1 and not plan.mergekit


@dataclass
class Measure:
    """Measures the scores of the layouts of one loaded base. A layout is given as a directive.

    Attributes:
        base: The base.
        depth: The number of its layers.
        plan: Plans a layout.
        build: Builds the model of a plan.
        warn: Called with each warning.
        reason: Why layouts are not measured layer by layer, as a clause; None if they are.
        pads: Whether a shorter sequence is padded to be measured with a longer one.
        at_work: Returns a context in which a layer of the base can be applied.
        most: The maximum bytes of states and logits; None for any number.
    """

    base: Any
    depth: int
    plan: Callable[[str], ExpansionPlan]
    build: Build
    warn: Warn = lambda _: None
    reason: str | None = None
    pads: bool = True
    at_work: Callable[[Any], AbstractContextManager[object]] = nullcontext
    most: int | None = None
    _edited: dict[Step, Any] = field(default_factory=dict)
    _built: dict[str, Any] = field(default_factory=dict)
    _group: tuple[str, ...] = ()

    def check(self, batch: Batch, layouts: Sequence[str]) -> None:
        """Find out how layouts can be measured, and set `reason` and `pads`.

        Args:
            batch: Sequences to compare on: what is computed with padding with what is computed
                without; what is computed layer by layer with whole models, for the base and for
                some layouts, on the longest sequence.
            layouts: These layouts; see `to_compare`.

        Raises:
            DirectiveError: The model has not as many tokens as the tokenizer.
        """
        check_vocabulary(self.base, np.array(batch.rows()))
        self.pads = self._may_pad(batch)
        try:
            fault = self._fault(batch, layouts)
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

    def _fault(self, batch: Batch, layouts: Sequence[str]) -> str | None:
        """Return what is wrong if layouts are measured layer by layer; None if nothing is.

        Raises:
            NotLayerMajorError: They cannot be.
            RefusedError: A layout cannot be built.
        """
        _tried(lambda: self._layer_major.check(batch))
        wanted = {row: self._path(layout) for row, layout in enumerate(layouts)}
        with_base = {-1: self._base_path, **wanted}
        longest = Batch((0,), (_longest(batch),))
        found = _tried(lambda: self._layer_major.scores(longest, with_base))
        apart = self._apart(found[-1], self._alone(self.base, longest))
        if apart:
            return f"scores of the base would be {apart:.1g} nats apart"
        for row, layout in enumerate(layouts):
            model = self.build(self.plan(layout))
            apart = self._apart(found[row], self._alone(model, longest))
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
        return self._measured([None], batch)

    def scores(self, layouts: Sequence[str], batch: Batch) -> Floats:
        """Return the scores of some layouts, of shape (layouts, sequences).

        The scores of a layout that `run` refuses, which only shows when it is built, are -inf.

        Args:
            layouts: The layouts.
            batch: The sequences.
        """
        if self._group != tuple(layouts):  # else it is the next batch of the same layouts
            self._group = tuple(layouts)
            self._built.clear()
            if self.most is not None:
                self._edited.clear()
        return self._measured(layouts, batch)

    def _measured(self, layouts: Sequence[str | None], batch: Batch) -> Floats:
        """Return the scores of some layouts; None is the base."""
        check_vocabulary(self.base, np.array(batch.rows()))
        fast = {} if self.reason else self._fast(layouts)
        found = np.full((len(layouts), len(batch.sequences)), -np.inf)
        parts = [*self.parts(batch)]
        try:
            for places, part in parts if fast else ():
                own = self._layer_major.scores(part, fast)
                found[np.ix_([*fast], places)] = [own[row] for row in fast]
        except NotLayerMajorError as error:
            self._fall_back(str(error))
            fast = {}
        for row, layout in enumerate(layouts):
            if row not in fast:
                with self._unless_refused():
                    model = self.base if layout is None else self._model(layout)
                    for places, part in parts:
                        found[row, places] = self._alone(model, part)
        return found

    def _fast(self, layouts: Sequence[str | None]) -> dict[int, Path]:
        """Return the paths of those layouts that are measured layer by layer, by their places."""
        found: dict[int, Path] = {}
        for row, layout in enumerate(layouts):
            if layout is None:
                found[row] = self._base_path
            elif _is_simple(self.plan(layout)):
                with self._unless_refused():
                    found[row] = self._path(layout)
        return found

    def _model(self, layout: str) -> Any:
        """Return the model of a layout; it is kept for the next batch if it shares all weights."""
        if layout in self._built:
            return self._built[layout]
        plan = self.plan(layout)
        model = self.build(plan)
        is_edited = any(layer.edit for layer in plan.layout.layers)
        if not is_edited and not plan.first.require_family().facts.changes_weights:
            self._built[layout] = model
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

    def _path(self, layout: str) -> Path:
        """Return the path of a layout; its edited layers are built."""
        plan = self.plan(layout)
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
    longest = _longest(batch)
    lengths = {max(len(longest.tokens) // parts, 2) for parts in (1, 2, 4)}
    cut = tuple(replace(longest, tokens=longest.tokens[:length], start=1) for length in lengths)
    return Batch(tuple(range(len(cut))), cut)


def _longest(batch: Batch) -> ScoredTokens:
    return max(batch.sequences, key=lambda each: len(each.tokens))


def _compared(batch: Batch, scores: Sequence[float]) -> Iterator[tuple[list[float], Batch]]:
    """Yield the sequences of each length as a batch, with their scores."""
    for places, part in by_length(batch):
        yield [scores[place] for place in places], part
