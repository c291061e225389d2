"""`train`: which layers to train, in each trainer's own words.

What a trainer would make of the words is worked out from its rules (`selectors`) on the model's own
names before they are given out: they select the new layers and nothing else, or they are refused.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_interleave.directive import yaml_io
from mergekit_interleave.errors import DirectiveError, RefusedError
from mergekit_interleave.training import lora_target, selectors
from mergekit_interleave.training.lora_target import Lora
from mergekit_interleave.training.target import Trainee

FULL, LORA = METHODS = ("full", "lora")

_OTHERS = "--for transformers, trl, peft, llamafactory, axolotl, ms-swift or unsloth"


@dataclass(frozen=True)
class Settings:
    """What to tell a trainer.

    Attributes:
        text: The settings: YAML, shell words or Python, as the trainer takes them.
        method: What they do to the new layers.
        notes: What to know about them.
    """

    text: str
    method: str
    notes: tuple[str, ...] = ()


Form = Callable[[Trainee], Settings]


@dataclass(frozen=True)
class Trainer:
    """What a trainer can do.

    Attributes:
        title: What it is called.
        full: Trains the new layers themselves; None where it has no setting for that.
        lora: Trains a LoRA of them, likewise.
        without: Why one of them, or both, are missing.
        instead: What to use then.
    """

    title: str
    full: Form | None = None
    lora: Form | None = None
    without: str = ""
    instead: str | None = None

    def form(self, method: str) -> Form | None:
        """What writes the settings of a method."""
        return self.full if method == FULL else self.lora


def check(name: str, method: str | None = None) -> None:
    """Check, before the model is looked at, that a trainer trains certain layers by a method.

    Args:
        name: The trainer, one of `TRAINERS`.
        method: `full`, `lora`, or None for what the trainer can do best.

    Raises:
        DirectiveError: There is no such trainer or method.
        RefusedError: The trainer has no words for it.
    """
    trainer = TRAINERS.get(name)
    if trainer is None:
        raise DirectiveError(f"--for: {name!r} is no trainer", hint=f"one of {', '.join(TRAINERS)}")
    if method not in (None, *METHODS):
        raise DirectiveError(f"--method: {method!r} is no method", hint="full or lora")
    if not any(trainer.form(kind) for kind in ([method] if method else METHODS)):
        raise RefusedError(f"{trainer.title}: {trainer.without}", hint=trainer.instead)


def settings(trainee: Trainee, name: str, method: str | None = None) -> Settings:
    """What to tell a trainer, so that it trains exactly the new layers.

    Where the method is left to the trainer and the layers themselves cannot be said, it is the LoRA
    form, with the reason among the notes.

    Args:
        trainee: What is to be trained.
        name: The trainer.
        method: See `check`.

    Raises:
        DirectiveError: There is no such trainer or method.
        RefusedError: The trainer has no words for it.
    """
    check(name, method)
    trainer = TRAINERS[name]
    kinds = [kind for kind in ([method] if method else METHODS) if trainer.form(kind)]
    try:
        return _settings(trainee, trainer, kinds[0])
    except RefusedError as error:
        if len(kinds) == 1:
            raise
        found = _settings(trainee, trainer, kinds[1])
        return replace(found, notes=(f"{error}; so this is the LoRA form", *found.notes))


def _settings(trainee: Trainee, trainer: Trainer, method: str) -> Settings:
    form = trainer.form(method)
    if form is None:
        raise TypeError("`check` has let it pass")
    if method == FULL and trainee.quantized:
        raise RefusedError("the weights are quantized, and only a LoRA beside them can be trained")
    found = form(trainee)
    return replace(found, notes=(*found.notes, *_notes(trainee, method)))


def _notes(trainee: Trainee, method: str) -> Iterable[str]:
    if method == LORA and trainee.closed & trainee.adapted:
        yield (
            "matrices of the new layers are zero: nothing that divides by them (DoRA: NaN), "
            "multiplies or factors them (PiSSA, LoftQ, IA3, OFT, BOFT, HRA: no gradient), and "
            "never a LoRA without these output projections"
        )


# Plain PyTorch: the model is a Python object.


def _transformers(trainee: Trainee) -> Settings:
    layers = "".join(f"    model.{stack}[index].requires_grad_(True)\n" for stack in trainee.stacks)
    text = (
        f"from transformers import {trainee.task.load}\n\n"
        f"{_loaded(trainee)}"
        "model.requires_grad_(False)\n"
        f"for index in {_python(trainee.new)}:\n{layers}"
    )
    return Settings(text, FULL, tuple(_in_memory(trainee)))


def _in_memory(trainee: Trainee) -> Iterator[str]:
    yield (
        "the same in one line: mergekit_interleave.freeze_original_layers(model), before an "
        "optimizer or Trainer is made"
    )
    if trainee.half_dtype:
        yield (
            f"the weights load as {trainee.half_dtype}, in which most steps of a usual learning "
            'rate are rounded away: dtype="float32" for what is trained, and bf16=True for the '
            "Trainer"
        )


def _trl(trainee: Trainee) -> Settings:
    found = _transformers(trainee)
    hint = "# SFTTrainer(model=model, ...): this object, not the name of its directory."
    return replace(found, text=f"{found.text}\n{hint}\n")


def _peft(trainee: Trainee) -> Settings:
    chosen = lora_target.choose(
        trainee, lora_target.by_layers(trainee), lora_target.by_endings(trainee)
    )
    task = '    task_type="CAUSAL_LM",\n' if trainee.task.tag == "text-generation" else ""
    text = (
        "from peft import LoraConfig, get_peft_model\n"
        f"from transformers import {trainee.task.load}\n\n"
        f"{_loaded(trainee)}"
        f"config = LoraConfig(\n{task}{_arguments(chosen)})\n"
        "model = get_peft_model(model, config)\n"
    )
    return Settings(text, LORA, tuple(_about(chosen)))


def _loaded(trainee: Trainee) -> str:
    code = ", trust_remote_code=True" if trainee.has_remote_code else ""
    return f"model = {trainee.task.load}.from_pretrained({_literal(trainee.directory)}{code})\n"


# YAML.


def _trl_lora(trainee: Trainee) -> Settings:
    chosen = lora_target.choose(
        trainee, lora_target.by_regex(trainee), lora_target.by_endings(trainee)
    )
    modules = [chosen.modules] if isinstance(chosen.modules, str) else [*chosen.modules]
    if len(modules) == 1 and not isinstance(chosen.modules, str):
        modules *= 2  # TRL takes a list of one for a regular expression
    return _yaml(
        LORA,
        {
            **_model(trainee, "model_name_or_path"),
            "use_peft": True,
            "lora_target_modules": modules,
            "lora_target_parameters": [*chosen.parameters],
            "lora_modules_to_save": [*chosen.saved],
            "lora_dropout": 0.0 if chosen.parameters else None,
        },
        _about(chosen),
    )


def _llamafactory(trainee: Trainee) -> Settings:
    count = len(trainee.new)
    if trainee.counted != trainee.depth:
        raise RefusedError(
            f"LLaMA-Factory's freeze mode counts {trainee.counted or 'no'} layers, where there are "
            f"{trainee.depth}"
        )
    ways = [(count, True), (count, False), (-count, False)]
    layers = {
        way: selectors.llamafactory_layers(trainee.depth, way[0], llama_pro=way[1]) for way in ways
    }
    found = next((way for way in ways if layers[way] == trainee.new), None)
    if found is None:
        raise RefusedError(
            f"LLaMA-Factory's freeze mode trains the last layer of each of {count} groups of the "
            f"same size, or the first or last {count} layers; of these {trainee.depth} layers the "
            f"new ones are {_spelled(trainee.new)}"
        )
    # By names alone an expert's index would be a layer's, where a class holds experts one by one.
    modules = trainee.children if trainee.stacked else ("",)
    lacking = {*modules} - {"", *selectors.llamafactory_modules(trainee.parameters)}
    if lacking:
        raise RefusedError(
            "LLaMA-Factory takes only modules of the first two layers, which have no "
            f"{min(lacking)}"
        )
    _check(
        trainee, selectors.llamafactory(trainee.parameters, trainee.new, modules), "LLaMA-Factory"
    )
    return _yaml(
        FULL,
        {
            **_model(trainee, "model_name_or_path"),
            "finetuning_type": "freeze",
            "use_llama_pro": True if found[1] else None,
            "freeze_trainable_layers": found[0],
            "freeze_trainable_modules": ",".join(modules) or "all",
        },
    )


def _llamafactory_lora(trainee: Trainee) -> Settings:
    def owners_of(chosen: Lora) -> list[str]:
        """It hands PEFT no parameters, so their modules are trained in full."""
        return [*dict.fromkeys(name.rpartition(".")[0] for name in chosen.parameters)]

    def is_exact_anywhere(chosen: Lora) -> bool:
        found = selectors.llamafactory_lora(trainee.modules, chosen.modules)
        saved = selectors.peft_saved(trainee.modules, owners_of(chosen))
        return (
            found == selectors.peft_modules(trainee.modules, chosen.modules)
            and {*trainee.within(saved)} == saved
        )

    endings = (chosen for chosen in lora_target.by_endings(trainee) if is_exact_anywhere(chosen))
    chosen = lora_target.choose(trainee, endings)
    owners = owners_of(chosen)
    saved = [*chosen.saved, *owners]
    notes = [*_about(chosen)]
    if owners:
        notes.append(f"{owners[0]} and its like are trained in full: it has no LoRA of them")
    return _yaml(
        LORA,
        {
            **_model(trainee, "model_name_or_path"),
            "finetuning_type": "lora",
            "lora_target": ",".join(chosen.modules),
            "additional_target": ",".join(saved) or None,
        },
        notes,
    )


def _axolotl(trainee: Trainee) -> Settings:
    patterns = [f"{stack}.{_group(trainee.new)}." for stack in trainee.stacks]
    _check(trainee, selectors.axolotl(trainee.parameters, patterns), "axolotl")
    return _yaml(FULL, {**_model(trainee, "base_model"), "unfrozen_parameters": patterns})


def _axolotl_lora(trainee: Trainee) -> Settings:
    chosen = lora_target.choose(
        trainee, lora_target.by_layers(trainee), lora_target.by_endings(trainee)
    )
    return _yaml(
        LORA,
        {
            **_model(trainee, "base_model"),
            "adapter": "lora",
            "lora_r": _RANK,
            "lora_alpha": 2 * _RANK,
            "lora_target_modules": [*chosen.modules],
            "peft_layers_to_transform": [*(chosen.layers or ())],
            "peft_layers_pattern": [chosen.pattern] if chosen.pattern else None,
            "lora_target_parameters": [*chosen.parameters],
            "lora_modules_to_save": [*chosen.saved],
            "lora_dropout": 0.0 if chosen.parameters else None,
        },
        _about(chosen),
    )


def _model(trainee: Trainee, key: str) -> dict[str, object]:
    """What to load; a model's own code is nowhere run unasked."""
    return {key: trainee.directory, "trust_remote_code": trainee.has_remote_code or None}


_RANK = 16
"""For axolotl, which hands PEFT None where nothing is said, and PEFT takes no None."""


def _yaml(method: str, content: Mapping[str, object], notes: Iterable[str] = ()) -> Settings:
    said = {key: value for key, value in content.items() if value not in (None, [])}
    return Settings(yaml_io.write(said), method, tuple(notes))


# Shell words.


def _swift(trainee: Trainee) -> Settings:
    prefixes = [f"{stack}.{index}." for stack in trainee.stacks for index in trainee.new]
    _check(trainee, selectors.swift(trainee.parameters, prefixes), "ms-swift")
    return _shell(
        FULL,
        {
            "--model": [trainee.directory],
            "--tuner_type": ["full"],
            "--freeze_parameters_ratio": ["1"],
            "--trainable_parameters": prefixes,
        },
        [_MODEL_TYPE],
    )


def _swift_lora(trainee: Trainee) -> Settings:
    chosen = lora_target.choose(
        trainee, lora_target.by_regex(trainee), lora_target.by_endings(trainee)
    )
    modules: tuple[str, Sequence[str]] = ("--target_modules", chosen.modules)
    if isinstance(chosen.modules, str):
        modules = ("--target_regex", [chosen.modules])
    return _shell(
        LORA,
        {
            "--model": [trainee.directory],
            "--tuner_type": ["lora"],
            modules[0]: modules[1],
            "--target_parameters": chosen.parameters,
            "--modules_to_save": chosen.saved,
            "--lora_dropout": ["0"] if chosen.parameters else [],
        },
        [*_about(chosen), _MODEL_TYPE],
    )


_MODEL_TYPE = (
    "if ms-swift cannot tell the model's type, since several of its types have the same class: "
    "--model_type, with that of the base"
)


def _shell(
    method: str, options: Mapping[str, Sequence[str]], notes: Iterable[str] = ()
) -> Settings:
    lines = [f"{flag} {shlex.join(words)}" for flag, words in options.items() if words]
    return Settings(" \\\n".join(lines) + "\n", method, tuple(notes))


def _unsloth(trainee: Trainee) -> Settings:
    plain = trainee.model_type in _UNSLOTH_FAST
    ways = (
        lora_target.by_layers(trainee, pattern=False) if plain else lora_target.by_endings(trainee)
    )
    chosen = lora_target.choose(trainee, ways)
    if chosen.saved:
        raise RefusedError(
            f"unsloth: {chosen.saved[0]} and its like let nothing pass, cannot have a LoRA, and "
            "unsloth trains nothing else",
            hint="--for peft, or --for transformers",
        )
    loader = "FastLanguageModel" if plain else "FastModel"
    code = "    trust_remote_code=True,\n" if trainee.has_remote_code else ""
    text = (
        f"from unsloth import {loader}\n\n"
        f"model, tokenizer = {loader}.from_pretrained(\n"
        f"    {_literal(trainee.directory)},\n"
        f"    load_in_4bit=False,\n{code})\n"
        f"model = {loader}.get_peft_model(\n    model,\n{_arguments(chosen)})\n"
    )
    note = "load_in_4bit=True needs less memory, and the frozen layers are then not the base's"
    return Settings(text, LORA, (note, *_about(chosen)))


_UNSLOTH_FAST = frozenset({"gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3"})
"""The types whose layers unsloth (2026-08-22) takes by their indices, others by names alone."""


# What they share.


def _arguments(chosen: Lora) -> str:
    """PEFT's words as Python arguments."""
    said = {
        "target_modules": chosen.modules,
        "layers_to_transform": chosen.layers,
        "layers_pattern": chosen.pattern,
        "target_parameters": chosen.parameters,
        "modules_to_save": chosen.saved,
        "lora_dropout": 0.0 if chosen.parameters else None,
    }
    return "".join(
        f"    {key}={_python(value)},\n" for key, value in said.items() if value not in (None, ())
    )


def _python(value: object) -> str:
    """A value as Python, a long list on several lines."""
    if not isinstance(value, tuple):
        return _literal(value)
    words = [_literal(item) for item in value]
    line = f"[{', '.join(words)}]"
    if len(line) <= _WIDTH:
        return line
    inner = textwrap.fill(
        ", ".join(words),
        _WIDTH,
        initial_indent=" " * 8,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"[\n{inner},\n    ]"


def _literal(value: object) -> str:
    """A string, a number or a list as Python; JSON's letters beyond its first plane are not."""
    return json.dumps(value, ensure_ascii=False)


_WIDTH = 76


def _about(chosen: Lora) -> Iterator[str]:
    if chosen.saved:
        yield (
            f"{chosen.saved[0]} and its like let nothing pass and cannot have a LoRA; they are "
            "trained in full beside it, or it would get no gradient"
        )
    if chosen.parameters:
        yield (
            "experts are named as transformers 5 holds them, all in one parameter; 4.x has a "
            "module for each, which these words do not reach"
        )


def _group(layers: Sequence[int]) -> str:
    """A regular expression for one of some indices."""
    return str(layers[0]) if len(layers) == 1 else f"({'|'.join(map(str, layers))})"


def _spelled(layers: Sequence[int]) -> str:
    """A list of indices for a sentence."""
    words = [str(index) for index in layers]
    return ", ".join(words if len(words) <= _MANY else [*words[: _MANY - 2], "...", words[-1]])


_MANY = 12


def _check(trainee: Trainee, selected: set[str], title: str) -> None:
    """Check that a trainer's words select the parameters of the new layers and no others."""
    if selected != trainee.trained:
        odd = min(selected ^ trainee.trained)
        what = "may also train" if odd in selected else "would not train"
        raise RefusedError(f"{title} {what} {odd}")


TRAINERS = {
    "transformers": Trainer(
        "transformers",
        full=_transformers,
        without="has no LoRA of its own",
        instead="--for peft",
    ),
    "trl": Trainer("TRL", full=_trl, lora=_trl_lora),
    "peft": Trainer(
        "PEFT",
        lora=_peft,
        without="it trains adapters, not layers",
        instead="--for transformers",
    ),
    "llamafactory": Trainer("LLaMA-Factory", full=_llamafactory, lora=_llamafactory_lora),
    "axolotl": Trainer("axolotl", full=_axolotl, lora=_axolotl_lora),
    "ms-swift": Trainer("ms-swift", full=_swift, lora=_swift_lora),
    "unsloth": Trainer(
        "unsloth",
        lora=_unsloth,
        without="full training of some layers alone is no supported way there",
        instead="--for transformers, or --method lora",
    ),
    "torchtune": Trainer(
        "torchtune",
        without="no setting of it trains certain layers alone, by either method",
        instead=_OTHERS,
    ),
    "litgpt": Trainer(
        "LitGPT",
        without="no setting of it trains certain layers alone, by either method",
        instead=_OTHERS,
    ),
}
"""The trainers, by the names that the command line has for them."""
