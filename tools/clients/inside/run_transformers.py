"""Load models with another transformers, and save their logits.

Usage: OUT --loads|--resave DIR MODEL...
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

TEXT = "The river froze early that year, and the children skated to school before the sun came up."


def tokens() -> torch.Tensor:
    """Return the tokens of the toys."""
    return torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(1))


def load(path: str, out: Path) -> dict[str, object]:
    """Load a model and its tokenizer; return the file of its logits, and its perplexity."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens()).logits
    file = out / f"{Path(path).name}.npy"
    np.save(file, logits.numpy())
    found: dict[str, object] = {"logits": str(file), "missing": sorted(info["missing_keys"])[:3]}
    try:
        ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        found["perplexity"] = float(loss.exp())
    except Exception as error:  # noqa: BLE001 - the caller compares the error
        found["tokenizer"] = f"{type(error).__name__}: {error}"[:150]
    return found


def parameters() -> dict[str, dict[str, object]]:
    """Return the parameters of each config class with their defaults."""
    found: dict[str, dict[str, object]] = {}
    for name in CONFIG_MAPPING_NAMES:
        try:
            signature = inspect.signature(CONFIG_MAPPING[name].__init__).parameters
        except Exception:  # noqa: BLE001, S112 - a class that needs another package
            continue
        pairs = {key: p.default for key, p in signature.items() if key not in ("self", "kwargs")}
        found[name] = {k: None if v is inspect.Parameter.empty else v for k, v in pairs.items()}
    return found


def main() -> None:
    """Print the results as JSON."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {"": parameters()}
    resave = sys.argv[2] == "--resave"
    for path in sys.argv[2 + 2 * resave :]:
        try:
            if resave:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                model.save_pretrained(Path(sys.argv[3]) / Path(path).name)
            results[path] = load(path, out)
        except Exception as error:  # noqa: BLE001, PERF203 - the caller compares the error
            results[path] = {"error": f"{type(error).__name__}: {error}"[:150]}
    print(json.dumps(results, default=str))


main()
