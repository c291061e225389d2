"""Write LLaMA-Factory's YAML for its freeze mode or for a LoRA.

The rules restate LLaMA-Factory's source of 2026-08-18 (model/adapter.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.training import lora_target, peft_rules
from mergekit_interleave.training.lora_target import LoraTarget
from mergekit_interleave.training.settings import (
    TrainerSettings,
    check_selection,
    lora_notes,
    model_keys,
    precision_key,
    yaml_text,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import FULL, LORA


def layer_count(config: object) -> int | None:
    """Return the number of layers that LLaMA-Factory reads from a model's config object."""
    text_config = getattr(config, "text_config", config)
    return next(filter(None, (getattr(text_config, key, None) for key in _COUNTS)), None)


_COUNTS = ("num_hidden_layers", "num_layers", "n_layer")


def freeze_mode_layers(depth: int, count: int, *, llama_pro: bool) -> tuple[int, ...]:
    """Return the layers that the freeze mode trains.

    Args:
        depth: The number of layers.
        count: `freeze_trainable_layers`.
        llama_pro: `use_llama_pro`.
    """
    if llama_pro:
        if count < 1 or depth % count:
            return ()
        stride = depth // count
        return tuple(range(stride - 1, depth + stride - 1, stride))
    if count > 0:
        return tuple(range(max(0, depth - count), depth))
    return tuple(range(min(-count, depth)))


def trained_parameters(
    parameters: Iterable[str],
    layers: Sequence[int],
    modules: Collection[str] = ("",),
    extra: Collection[str] = (),
) -> set[str]:
    """Return the parameters that the freeze mode trains.

    It searches each name for a layer's index that is followed by a module's name, and for the names
    of other modules.

    Args:
        parameters: The names of all parameters.
        layers: See `freeze_mode_layers`.
        modules: `freeze_trainable_modules`; an empty string stands for `all`.
        extra: `freeze_extra_modules`.
    """
    marks = [*(f".{index}.{module}" for index in layers for module in modules), *extra]
    return {name for name in parameters if any(mark in name for mark in marks)}


def known_modules(parameters: Iterable[str]) -> set[str]:
    """Return the modules of the first two layers, which `freeze_trainable_modules` may name."""
    parted = (re.split(r"\.0\.|\.1\.", name)[1:] for name in parameters)
    return {parts[-1].partition(".")[0] for parts in parted if parts}


def adapted_modules(modules: Iterable[str], targets: Collection[str]) -> set[str]:
    """Return the modules that `lora_target` selects in a model that takes images.

    LLaMA-Factory searches each name for each target. In other models it passes them to PEFT.
    """
    return {name for name in modules if any(target in name for target in targets)}


def full(target: TrainingTarget) -> TrainerSettings:
    """Write the freeze mode's settings, if its formula gives exactly the layers to train."""
    count, llama_pro = _formula(target)
    # If a class has one module per expert, an expert's index looks like a layer's.
    modules = target.children if target.experts else ("",)
    unknown = {*modules} - {"", *known_modules(target.parameters)}
    if unknown:
        raise RefusedError(
            "LLaMA-Factory accepts only modules of the first two layers, which have no "
            f"{min(unknown)}"
        )
    extra = [module.rpartition(".")[2] for module in target.also]
    selected = trained_parameters(target.parameters, target.layers, modules, extra)
    check_selection(target, selected, "LLaMA-Factory")
    text = yaml_text(
        {
            **model_keys(target, "model_name_or_path"),
            **precision_key(target),
            "finetuning_type": "freeze",
            "use_llama_pro": llama_pro or None,
            "freeze_trainable_layers": count,
            "freeze_trainable_modules": ",".join(modules) or "all",
            "freeze_extra_modules": ",".join(extra) or None,
        }
    )
    return TrainerSettings(text, FULL, tuple(_notes(target)))


def _notes(target: TrainingTarget) -> Iterator[str]:
    """Yield what LLaMA-Factory does to weights in 32 bits (model/patcher.py)."""
    if target.exact_dtype == "float32":
        yield (
            "the weights have 32 bits, but LLaMA-Factory loads them in 16 bits on a GPU, except "
            "with DeepSpeed ZeRO-3; that rounds the original layers, and no other setting prevents "
            "it, so use --for axolotl or --for ms-swift"
        )


def _formula(target: TrainingTarget) -> tuple[int, bool]:
    """Return the `freeze_trainable_layers` and `use_llama_pro` that give the layers to train."""
    counted, count = layer_count(target.config), len(target.layers)
    if counted != target.depth:
        raise RefusedError(
            f"LLaMA-Factory's freeze mode counts {counted or 'no'} layers, but the model has "
            f"{target.depth}"
        )
    for number, llama_pro in ((count, True), (count, False), (-count, False)):
        layers = freeze_mode_layers(target.depth, number, llama_pro=llama_pro)
        if layers == target.layers:
            return number, llama_pro
    raise RefusedError(
        f"LLaMA-Factory's freeze mode trains the last layer of each of {count} equal groups, or "
        f"the first or last {count} layers; this model has {target.depth} layers, of which "
        f"{_listed(target.layers)} are to be trained"
    )


def _listed(layers: Sequence[int]) -> str:
    """Write indices as a list within a sentence."""
    words = [str(index) for index in layers]
    return ", ".join(words if len(words) <= _MANY else [*words[: _MANY - 2], "...", words[-1]])


_MANY = 12


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write a LoRA by name endings that are exact by LLaMA-Factory's rule and by PEFT's."""
    endings = (form for form in lora_target.by_endings(target) if _is_exact_anywhere(target, form))
    chosen = lora_target.choose(target, endings)
    owners = _owners(chosen)
    notes = [*lora_notes(chosen), *_notes(target)]
    if owners:
        notes.append(f"{owners[0]} and similar modules are trained in full, not by a LoRA")
    text = yaml_text(
        {
            **model_keys(target, "model_name_or_path"),
            **precision_key(target),
            "finetuning_type": "lora",
            "lora_target": ",".join(chosen.modules),
            "additional_target": ",".join([*chosen.modules_to_save, *owners]) or None,
        }
    )
    return TrainerSettings(text, LORA, tuple(notes))


def _is_exact_anywhere(target: TrainingTarget, form: LoraTarget) -> bool:
    """Return whether a search in whole names finds the same modules as PEFT's endings."""
    saved = peft_rules.saved_modules(target.modules, _owners(form))
    return (
        adapted_modules(target.modules, form.modules)
        == peft_rules.adapted_modules(target.modules, form.modules)
        and {*target.within(saved)} == saved
    )


def _owners(chosen: LoraTarget) -> list[str]:
    """Return the modules of adapted parameters.

    They are trained in full, because LLaMA-Factory passes no parameters on to PEFT.
    """
    return [*dict.fromkeys(name.rpartition(".")[0] for name in chosen.parameters)]
