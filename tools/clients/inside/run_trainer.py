"""Run the code that `train` prints, and train with it. Usage: peft|trl CODE.

The last line of output says which layers are trainable, and which tensors a training step changed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

names: dict[str, Any] = {}
code = Path(sys.argv[2]).read_text(encoding="utf-8")
exec(code, names)  # noqa: S102 - `train` tells users to run it
model = names["model"]
trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
before = {name: tensor.clone() for name, tensor in model.named_parameters()}
(path,) = re.findall(r'from_pretrained\(\s*"([^"]+)"', code)
with tempfile.TemporaryDirectory() as out:
    settings = SFTConfig(
        output_dir=out,
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        max_length=16,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    text = " ".join(f"word{index}" for index in range(20))
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([{"text": text}] * 4),
        processing_class=AutoTokenizer.from_pretrained(path, pad_token="<unk>"),
    )
    trainer.train()
after = dict(trainer.model.named_parameters())
changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def layers(parameters: set[str]) -> list[int]:
    """Return the indices of the layers of parameters; -1 for one outside the layers."""
    found = (re.search(r"\.layers\.(\d+)\.", name) for name in parameters)
    return sorted({int(match[1]) if match else -1 for match in found})


print(json.dumps({"trainable": layers(trainable), "changed": layers(changed)}))
