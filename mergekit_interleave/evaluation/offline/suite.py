"""Write the offline tasks as files that lm-eval reads like those of any other task.

- `offline_text`: passages of the last two thirds of "In the Year 2889" (Jules and Michel Verne, The
  Forum, New York, February 1889; in the public domain), which comes with reasoning-gym. `scan`
  measures layouts on the first third, so the rest is held out. A model may have seen all of it in
  its own training.
- `offline_arithmetic`: the likelihood of the right answer, and whether it is the likeliest text.
- `offline_logic`: which of some answers is the likeliest.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave import _requirements
from mergekit_interleave._files import read_text
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.evaluation.offline import reasoning

WANTED = "reasoning-gym>=0.1.25"
"""The requirement of the extra `eval`; the package needs Python 3.11."""

TAG = "offline"
"""The name of all tasks together, with which the name of each begins."""

NAMES = (TAG, f"{TAG}_text", f"{TAG}_arithmetic", f"{TAG}_logic")
"""The names that `--tasks` accepts."""

VERSION = 1
"""The version of the tasks; a change of any item changes it."""

SEED = 2889
"""The seed of the items, which no example of this project uses."""

COUNT = 300
"""The number of items of arithmetic, and of logic."""

SHOTS = 3
"""The number of examples before each question of arithmetic, which show the form of an answer."""

PASSAGE = 150
"""The minimum number of characters of a passage."""

_FIRST, _LAST = "Then, the two men bowing to him", "Jules Verne."
"""The text begins with the one, after what `scan` uses, and ends before the other."""


def is_offline(name: str) -> bool:
    """Whether a name, perhaps with `*`, is that of an offline task, or of all of them."""
    return any(fnmatch.fnmatch(known, name) for known in NAMES)


def write(folder: Path) -> None:
    """Write the tasks and their items.

    Args:
        folder: An empty directory.

    Raises:
        RequirementError: reasoning-gym is not installed.
    """
    _requirements.check_extra(WANTED)
    arithmetic, _ = reasoning.make(SHOTS + COUNT, SEED, reasoning.ARITHMETIC)
    logic, _ = reasoning.make(COUNT, SEED, reasoning.LOGIC)
    _write_task(
        folder,
        "text",
        [{"text": passage} for passage in passages(_text(), PASSAGE)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metrics=[("bits_per_byte", "bits_per_byte", False)],
    )
    questions = [
        {"question": item["prompt"].rstrip(), "answer": item["answer"]} for item in arithmetic
    ]
    _write_task(
        folder,
        "arithmetic",
        questions[SHOTS:],
        output_type="loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target=" {{answer}}",  # lm-eval puts the delimiter before examples only
        target_delimiter="",
        num_fewshot=SHOTS,
        fewshot_config={"sampler": "first_n", "samples": questions[:SHOTS]},
        metrics=[("acc", "mean", True), ("perplexity", "perplexity", False)],
    )
    _write_task(
        folder,
        "logic",
        [
            {
                "question": item["prompt"].rstrip(),
                "choices": _choices(item),
                "answer": _choices(item).index(item["answer"]),
            }
            for item in logic
        ],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_target="answer",
        doc_to_choice="choices",
        metrics=[("acc", "mean", True)],
    )


def _choices(item: dict[str, Any]) -> list[str]:
    """Return the answers to choose from: those of the item, or the numbers next to the right one.

    For these items, the number in the question is the obvious wrong answer; it is among them.
    """
    if "choices" in item:
        return list(item["choices"])
    right = int(item["answer"])
    return [str(number) for number in range(max(0, right - 2), right + 3)]


def passages(text: str, least: int) -> list[str]:
    """Join the sentences of a text into passages.

    Args:
        text: The text.
        least: The minimum number of characters of a passage; what is left at the end is dropped.
    """
    found, begun = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        begun = f"{begun} {' '.join(sentence.split())}".strip()
        if len(begun) >= least:
            found.append(begun)
            begun = ""
    return found


def _text() -> str:
    """Return the text without marks of italics, and without the words of Project Gutenberg."""
    from reasoning_gym.data import get_data_file_path  # noqa: PLC0415 - an optional requirement

    whole = read_text(Path(str(get_data_file_path("in_the_year_2889.txt"))))
    return whole[whole.index(_FIRST) : whole.rindex(_LAST)].replace("_", "")


def _write_task(
    folder: Path,
    name: str,
    items: Sequence[dict[str, Any]],
    *,
    metrics: Iterable[tuple[str, str, bool]],
    **how: Any,
) -> None:
    """Write a task and its items.

    Args:
        folder: The directory.
        name: The name of the task, after the tag.
        items: The items.
        metrics: The metrics: name, aggregation, and whether a higher value is better.
        how: Other keys of the task.
    """
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    config = {
        "task": f"{TAG}_{name}",
        "tag": TAG,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),  # the usual cache would keep it for ever
        },
        "test_split": "test",
        "target_delimiter": " ",
        **how,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": is_better}
            for metric, aggregation, is_better in metrics
        ],
        "metadata": {"version": VERSION},
    }
    (folder / f"{name}.yaml").write_text(yaml_io.write(config), encoding="utf-8")
