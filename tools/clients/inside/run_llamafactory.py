"""Read the settings that `train` prints with LLaMA-Factory, and load the model. Usage: YAML."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import yaml
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer

settings = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
with tempfile.TemporaryDirectory() as out:
    others = {
        "stage": "sft",
        "do_train": True,
        "dataset": "alpaca_en_demo",
        "template": "default",
        "output_dir": out,
        "use_cpu": True,
        "report_to": "none",
    }
    model_arguments, _, _, finetuning, _ = get_train_args({**others, **settings})
    tokenizer = load_tokenizer(model_arguments)["tokenizer"]
    model = load_model(tokenizer, model_arguments, finetuning, is_trainable=True)
trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
found = (re.search(r"\.(?:layers|h)\.(\d+)\.", name) for name in trained)
print(json.dumps({"trainable": sorted({int(match[1]) if match else -1 for match in found})}))
