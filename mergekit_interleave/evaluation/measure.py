"""Run a model on a task by lm-eval."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.evaluation import metrics
from mergekit_interleave.evaluation.processes import Processes
from mergekit_interleave.evaluation.scores import TaskScores
from mergekit_interleave.evaluation.tasks import LoadedTask, Tasks


class _Ticks:
    """Stands for the cache of answers that lm-eval fills; each answer is a step of progress."""

    def __init__(self, tick: Callable[[int], object]) -> None:
        self._tick = tick

    def add_partial(self, *_: object) -> None:
        """Note that a request was answered."""
        self._tick(1)


def language_model(
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    processes: Processes,
    tick: Callable[[int], object],
) -> Any:
    """Return a loaded model of transformers as a model of lm-eval.

    Args:
        model: The model. Weights on disk are moved by the hooks of accelerate.
        tokenizer: Its tokenizer.
        batch_size: The number of sequences that are computed together.
        processes: The processes that share the items.
        tick: Called with the number of answered requests of this process.
    """
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - takes seconds to import

    found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if found.device.type == "meta":  # the first weights are on disk
        found._device = _device_of_hooks(model)  # noqa: SLF001 - as HFLM does
    found.set_cache_hook(_Ticks(tick))
    processes.join(found)
    return found


def _device_of_hooks(model: Any) -> Any:
    """Return the device to which the hooks of accelerate move weights that are on disk."""
    import torch  # noqa: PLC0415 - takes seconds to import

    places = [place for place in model.hf_device_map.values() if place not in ("disk", "meta")]
    return torch.device(places[0] if places else "cpu")


def run(model: Any, loaded: LoadedTask, tasks: Tasks, processes: Processes) -> TaskScores:
    """Run a model on a task.

    Args:
        model: The result of `language_model`.
        loaded: The task.
        tasks: The tasks that it belongs to.
        processes: The processes that share the items.

    Raises:
        RefusedError: lm-eval cannot run it, or its results cannot be compared.
    """
    from lm_eval.evaluator import evaluate  # noqa: PLC0415

    _seed(loaded.task)
    try:
        results = evaluate(
            lm=model,
            task_dict={"tasks": {loaded.name: loaded.task}},
            limit=tasks.limit,
            bootstrap_iters=0,  # lm-eval's standard errors are not those of pairs
            log_samples=True,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"task {loaded.name}: lm-eval cannot run it: {reason}") from error
    # Only the first process has results.
    found: Any = None if results is None else _scores(loaded, results)
    whole: TaskScores = processes.of_first(found)
    return whole


def _seed(task: Any) -> None:
    """Set the seeds as lm-eval does, so that each model gets the same examples in the same order.

    `lm_eval.simple_evaluate` does that, too, but also starts git and other programs to describe the
    machine.
    """
    from lm_eval import defaults, utils  # noqa: PLC0415

    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)  # noqa: NPY002 - tasks draw from this generator
    utils.set_torch_seed(defaults.DEFAULT_OTHER_SEED)
    task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)


def _scores(loaded: LoadedTask, results: Mapping[str, Any]) -> TaskScores:
    samples: Sequence[Mapping[str, Any]] = results["samples"][loaded.name]
    digests = {
        int(sample["doc_id"]): f"{sample['doc_hash']} {sample['prompt_hash']} "
        f"{sample['target_hash']}"
        for sample in samples
    }
    return TaskScores(
        loaded.name,
        re.sub(r"\.0$", "", str(results["versions"].get(loaded.name, "N/A"))),
        int(results["n-shot"].get(loaded.name) or 0),
        loaded.dataset,
        tuple(digests[number] for number in sorted(digests)),
        loaded.groups,
        metrics.metrics_of(loaded.task, samples),
    )
