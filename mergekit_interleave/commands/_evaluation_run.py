"""Run the models of an evaluation on its tasks, one model after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.commands._evaluated_models import Evaluated
from mergekit_interleave.engines.copy_range import Tick
from mergekit_interleave.engines.protocol import Bar
from mergekit_interleave.evaluation import measure
from mergekit_interleave.evaluation.journal import Journal
from mergekit_interleave.evaluation.processes import Processes
from mergekit_interleave.evaluation.scores import TaskScores
from mergekit_interleave.evaluation.tasks import LoadedTask, Tasks


@dataclass
class Run:
    """Runs models on tasks, and keeps what they score.

    Attributes:
        tasks: The tasks.
        tokenizer: The tokenizer of the models.
        batch_size: The number of sequences that are computed together.
        journal: The scores that are known.
        everyone: The processes that share the items.
        fresh: Whether to measure known scores again.
        notes: What was known before.
    """

    tasks: Tasks
    tokenizer: Any
    batch_size: int
    journal: Journal
    everyone: Processes
    fresh: bool
    notes: tuple[str, ...] = ()

    def scores_of(self, models: Sequence[Evaluated], bar: Bar) -> list[dict[str, TaskScores]]:
        """Return the scores of each model by task; only one model at a time is measured.

        Raises:
            InterleaveError: A model cannot be loaded or run.
        """
        digests = [model.digest() for model in models]
        # The first process decides, so that all of them do the same.
        known = self.everyone.of_first([self._known(digest) for digest in digests])
        loaded = self.tasks.loaded
        before = sum(map(len, known))
        if before:
            total = len(loaded) * len(models)
            self.notes = (
                f"{before} of {total} results were measured before (--fresh repeats them)",
            )
        missing = [[task for name, task in loaded.items() if name not in own] for own in known]
        with bar(sum(task.requests for own in missing for task in own)) as tick:
            for model, digest, own, todo in zip(models, digests, known, missing, strict=True):
                if todo:
                    own.update(self._measured(model, digest, todo, tick))
        return [{name: own[name] for name in loaded} for own in known]

    def _known(self, digest: str) -> dict[str, TaskScores]:
        if self.fresh:
            return {}
        found = {name: self.journal.get(digest, t.digest) for name, t in self.tasks.loaded.items()}
        return {name: scores for name, scores in found.items() if scores is not None}

    def _measured(
        self,
        model: Evaluated,
        digest: str,
        todo: Sequence[LoadedTask],
        tick: Tick,
    ) -> Mapping[str, TaskScores]:
        """Measure a model on tasks, and keep each result at once."""
        found = {}
        with model.loaded() as loaded:
            asked = measure.language_model(
                loaded,
                self.tokenizer,
                batch_size=self.batch_size,
                processes=self.everyone,
                tick=lambda count: tick(count * self.everyone.count),
            )
            for task in todo:
                found[task.name] = measure.run(asked, task, self.tasks, self.everyone)
                if self.everyone.is_first:
                    self.journal.keep(digest, task.digest, found[task.name])
        return found
