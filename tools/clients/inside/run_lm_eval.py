"""Evaluate models on a small local task with lm-eval. Usage: MODEL..."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

QUESTIONS = [
    ("The capital of France is", [" Paris", " a river", " seven"], 0),
    ("Two plus two is", [" blue", " four", " Monday"], 1),
    ("Water freezes into", [" ice", " gold", " music"], 0),
    ("A week has seven", [" oceans", " colors", " days"], 2),
    ("The opposite of hot is", [" cold", " green", " loud"], 0),
    ("Cats and dogs are", [" numbers", " animals", " planets"], 1),
]
TASK = {
    "task": "local_questions",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}

with tempfile.TemporaryDirectory() as folder:
    lines = [json.dumps({"question": q, "choices": c, "label": n}) for q, c, n in QUESTIONS]
    data = Path(folder, "questions.json")
    data.write_text("\n".join(lines), encoding="utf-8")
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    Path(folder, "questions.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    found = {}
    for model in sys.argv[1:]:
        result = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={model},dtype=float32",
            tasks=["local_questions"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
            log_samples=True,
        )
        scores = [sample["filtered_resps"] for sample in result["samples"]["local_questions"]]
        metrics = result["results"]["local_questions"]
        found[model] = {
            "scores": [float(pair[0]) for answers in scores for pair in answers],
            "acc": metrics["acc,none"],
        }
print(json.dumps(found))
