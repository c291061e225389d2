"""The task of a model agrees with the tables of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import task as tasks

_COMPOSITES = json.loads(
    (Path(families.__file__).parent / "data" / "architectures.json").read_text()
)["composites"]

# The order matters: a few image classes are in text tables too, and the first match is used.
TABLES = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
TAGS = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


def _cases() -> list[tuple[str, str, str]]:
    known = {*families.known_types(), *_COMPOSITES} & {*CONFIG_MAPPING_NAMES}
    found: dict[tuple[str, str], str] = {}
    for load, table in TABLES.items():
        for model_type, named in getattr(modeling_auto, table).items():
            if model_type in known:
                for name in [named] if isinstance(named, str) else named:
                    found.setdefault((model_type, name), load)
    return [(*key, load) for key, load in found.items()]


def test_every_class_of_a_known_type_has_its_task() -> None:
    """Each class has the task of its transformers table; two exceptions have no tag."""
    wrong = {}
    for model_type, name, load in _cases():
        config: dict[str, Any] = {"model_type": model_type, "architectures": [name]}
        if model_type in _COMPOSITES:
            config["text_config"] = {"model_type": _COMPOSITES[model_type]["family"]}
        if tasks.task_of(config) != tasks.Task(TAGS[load], load):
            wrong[name] = tasks.task_of(config).tag
    assert wrong == {"BertGenerationDecoder": None, "ReformerModelWithLMHead": None}


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", [3], ["Unheard"]])
def test_an_unknown_class_has_no_tag(named: object) -> None:
    """An unknown class has no tag, because a missing tag is better than a wrong one."""
    assert tasks.task_of({"model_type": "llama", "architectures": named}).tag is None
