"""Share the items of a task among the processes that `accelerate launch` has started.

lm-eval does that only where it loads the model itself, and only on several GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation; this is one of them.

    Attributes:
        accelerator: The `Accelerator` that connects them; None if there is only this one.
    """

    accelerator: Any = None

    @property
    def count(self) -> int:
        """The number of processes."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def device(self) -> str | None:
        """The device of this process; None if it may take any."""
        return None if self.accelerator is None else str(self.accelerator.device)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def join(self, language_model: Any) -> None:
        """Let a model of lm-eval run only the items of this process, and collect all results.

        Args:
            language_model: An `HFLM`.
        """
        if self.accelerator is not None:
            language_model.accelerator = self.accelerator
            language_model._rank = self.accelerator.process_index  # noqa: SLF001 - as HFLM does
            language_model._world_size = self.count  # noqa: SLF001

    def of_first(self, value: T) -> T:
        """Return the value of the first process in every process."""
        if self.accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415

        found: T = broadcast_object_list([value])[0]
        return found


def started() -> Processes:
    """Return the processes that `accelerate launch` has started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    from datetime import timedelta  # noqa: PLC0415

    from accelerate import Accelerator  # noqa: PLC0415 - takes seconds to import
    from accelerate.utils import InitProcessGroupKwargs  # noqa: PLC0415

    # One process may wait long for another that has the longer items.
    patient = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    return Processes(Accelerator(kwargs_handlers=[patient]))
