"""Export models to ONNX and compute logits with ONNX Runtime. Usage: OUT MODEL..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForCausalLM

tokens = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(1))
out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
found = {}
for model in sys.argv[2:]:
    session = ORTModelForCausalLM.from_pretrained(model, export=True, use_cache=False)
    logits = session(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    found[model] = str(out / f"{Path(model).name}.npy")
    np.save(found[model], logits.numpy())
print(json.dumps(found))
