"""Grow a trained model by a fifth, and show that it still generates the same text."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPT = "Explain in one sentence why the sky is blue."
COMMAND = ["mk-interleave", "run", "interleave: every 5, zero: [o_proj, down_proj]"]


def main(base: Path, out: Path) -> int:
    """Expand BASE into OUT and compare the two; return 0 if they agree."""
    command = [*COMMAND, str(out), "--model", str(base), "--force"]
    command += ["--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    print("$", *(f"'{word}'" if " " in word else word for word in command))
    subprocess.run([sys.executable, "-m", "mergekit_interleave", *command[1:]], check=True)  # noqa: S603 - it runs this package

    layers = json.loads((out / "interleave.json").read_text(encoding="utf-8"))["layers"]
    print("\nlayers; new ones are in brackets, with the layer that they were copied from:")
    for i in range(0, len(layers), 6):
        print("   ", *(show(j, layer) for j, layer in enumerate(layers[i : i + 6], start=i)))

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": PROMPT}]
    tokens = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    logits, texts = [], []
    for path in (base, out):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(**tokens).logits)
            answer = model.generate(**tokens, max_new_tokens=48, do_sample=False)
        new_tokens = answer[0, tokens["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new_tokens, skip_special_tokens=True))
        print(f"\n{path.name}, {model.config.num_hidden_layers} layers, generates:\n   {texts[-1]}")
    difference = float((logits[0] - logits[1]).abs().max())
    print(f"\nlargest difference of the float32 logits: {difference:g}")
    print(f"both generate the same text: {'yes' if texts[0] == texts[1] else 'no'}")
    return 0 if difference == 0 and texts[0] == texts[1] else 1


def show(index: int, layer: dict[str, object]) -> str:
    """Return a layer as `12`, or a new one as `[13 from 12]`."""
    text = f"[{index} from {layer['layer']}]" if layer["new"] else str(index)
    return text.ljust(13)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", metavar="BASE", type=Path, help="directory of the model")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="output directory, replaced if it exists"
    )
    arguments = parser.parse_args()
    sys.exit(main(arguments.base, arguments.out))
