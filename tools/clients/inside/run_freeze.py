"""Freeze the original layers of a model with this project's function. Usage: MODEL."""

from __future__ import annotations

import json
import re
import sys

from transformers import AutoModelForCausalLM

from mergekit_interleave import freeze_original_layers

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
freeze_original_layers(model)
trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
found = {int(match[1]) for name in trained if (match := re.search(r"\.(\d+)\.", name))}
print(
    json.dumps({"layers": sorted(found), "others": [n for n in trained if not re.search(r"\d", n)]})
)
