"""Write the weights with the requested engine, or with the first engine that can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mergekit_interleave._units import amount
from mergekit_interleave.engines import registry, select
from mergekit_interleave.engines.protocol import (
    Estimate,
    NoRoomError,
    WriteOptions,
    WriteResult,
)
from mergekit_interleave.engines.registry import EngineRow
from mergekit_interleave.errors import OutputError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.planning.expansion_plan import ExpansionPlan


@dataclass(frozen=True)
class Writer:
    """Writes the weights, and the tokenizer if mergekit creates it.

    Attributes:
        plan: The plan to write.
        work: The directory to write into; it must contain the new config.json.
        how: The options for writing.
    """

    plan: ExpansionPlan
    work: Path
    how: WriteOptions

    def check_room(self) -> None:
        """Check that there is enough free disk space for the result.

        Raises:
            OutputError: There is too little for every engine that may write it.
        """
        select.check_room(self.plan, self.work, self.how)

    def write(self) -> WriteResult:
        """Write the weights.

        Raises:
            RefusedError: The engine cannot do it, or none can.
            OutputError: Writing failed, or there is too little free disk space.
        """
        try:
            return self._write()
        except OSError as error:
            raise OutputError(
                f"the weights cannot be written: {error.strerror or error}"
            ) from error

    def _write(self) -> WriteResult:
        first, *others = registry.rows(self.how.engine)
        try:
            return self._by(first)
        except RefusedError as error:
            refused = error
        reasons = [str(refused)]
        for row in others:
            reason = select.expected_refusal(row, self.plan)
            if reason is None:
                result = self._by(row)
                note = f"written by {row.title}: {refused}"
                return replace(result, beyond=str(refused), notes=(*result.notes, note))
            reasons.append(f"{row.title} {reason}")
        if not others:
            able = any(select.expected_refusal(row, self.plan) is None for row in self._unrequested)
            refused.hint = refused.hint or (self.how.request.remedy if able else None)
            raise refused
        converts = mergekit_yaml.dtype_of(self.plan.mergekit) is not None
        hint = "leave out `dtype`: every tensor keeps its own" if converts else refused.hint
        raise RefusedError("; and ".join(reasons), hint=hint) from refused

    def _by(self, row: EngineRow) -> WriteResult:
        engine = row.load()
        reason = engine.unsupported(self.plan)
        if reason is not None:
            named = self.how.engine == row.name
            hint = self.how.request.remedy if named else None
            raise RefusedError(f"{row.title} {reason}", hint=hint)
        saving = self._saving(row)
        try:
            traffic = engine.write(self.plan, self.work, self.how)
        except NoRoomError as error:
            if self._is_streamable and row.name != registry.STREAM:
                needs = self._estimate(registry.ENGINES[registry.STREAM]).traffic
                error.hint = (
                    f"--engine {registry.STREAM} needs {amount(needs.written)}: it writes no "
                    "zeros, and shares blocks if it can"
                )
            raise
        source = self.how.request.source
        named = source == registry.VARIABLE and self.how.engine == row.name
        notes = (f"written by {row.title}, set by {source}",) if named else ()
        return WriteResult(row.name, traffic, saving=saving, notes=notes)

    @property
    def _unrequested(self) -> list[EngineRow]:
        return [row for row in registry.ENGINES.values() if row.name != self.how.engine]

    def _saving(self, row: EngineRow) -> float:
        """Estimate the seconds that the stream engine would save."""
        if row.name == registry.STREAM or not self._is_streamable:
            return 0.0
        stream = registry.ENGINES[registry.STREAM]
        return max(0.0, self._estimate(row).seconds - self._estimate(stream).seconds)

    def _estimate(self, row: EngineRow) -> Estimate:
        return row.load().estimate(self.plan, self.work, self.how)

    @cached_property
    def _is_streamable(self) -> bool:
        return select.is_streamable(self.plan, self.how)
