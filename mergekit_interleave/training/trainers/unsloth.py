"""Write Python code that loads a model with unsloth and adds a LoRA.

unsloth passes its LoRA settings on to PEFT, except those for modules that are trained in full.
Without `dtype`, it loads all weights in the 16-bit dtype that the GPU supports best.
"""

from __future__ import annotations

from dataclasses import replace

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.training import lora_target, selection
from mergekit_interleave.training.lora_target import LoraTarget
from mergekit_interleave.training.settings import (
    TrainerSettings,
    lora_arguments,
    lora_notes,
    python_literal,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import LORA


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write PEFT's settings as arguments of unsloth's loader for the model type."""
    by_index = target.model_type in _BY_INDEX
    forms = (
        lora_target.by_layers(target, pattern=False) if by_index else lora_target.by_endings(target)
    )
    chosen = lora_target.choose(target, forms)
    if chosen.saved:
        raise RefusedError(
            f"unsloth: {chosen.saved[0]} and similar modules are zero and cannot be adapted by a "
            "LoRA, and unsloth cannot train them in full",
            hint="--for peft, or --for transformers",
        )
    chosen = replace(chosen, also=_outside(chosen))
    loader = "FastLanguageModel" if by_index else "FastModel"
    code = "    trust_remote_code=True,\n" if target.has_remote_code else ""
    exact = target.exact_dtype
    torch, dtype = ("import torch\n", f"    dtype=torch.{exact},\n") if exact else ("", "")
    text = (
        f"from unsloth import {loader}\n{torch}\n"
        f"model, tokenizer = {loader}.from_pretrained(\n"
        f"    {python_literal(target.directory)},\n"
        f"{dtype}    load_in_4bit=False,\n{code})\n"
        f"model = {loader}.get_peft_model(\n    model,\n{lora_arguments(chosen)})\n"
    )
    note = "load_in_4bit=True needs less memory, but the frozen layers then differ from the base's"
    return TrainerSettings(text, LORA, (note, *lora_notes(chosen)))


def _outside(chosen: LoraTarget) -> tuple[str, ...]:
    """Return the modules outside the layers as unsloth names them."""
    names = tuple(module.rpartition(".")[2] for module in chosen.also)
    for name in names:
        if name not in (selection.HEAD, selection.EMBEDDINGS):
            raise RefusedError(
                f"unsloth: it trains {selection.HEAD} and {selection.EMBEDDINGS} beside a LoRA, "
                f"but not {name}",
                hint="--for peft, or --for transformers",
            )
    return names


_BY_INDEX = frozenset({"gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3"})
"""The model types whose layers unsloth (2026-08-22) selects by index; for others it accepts only
names."""
