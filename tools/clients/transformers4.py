"""Load models that transformers 5 and 4 wrote, and those grown from them, with transformers 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import toys

from clients import models
from clients.environment import ClientError, Environment
from clients.row import Row
from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import transformers4
from mergekit_interleave.planning import legacy_config

ENVIRONMENT = Environment("transformers-4.57")
NAME = "transformers 4"
_DIFFER = frozenset(
    [
        "apertus",
        "bamba",
        "bigbird_pegasus",
        "cpmant",
        "dbrx",
        "mamba2",
        "modernbert-decoder",
        "qwen2_moe",
        "recurrent_gemma",
        "reformer",
        "xlstm",
        "zamba",
    ]
)
"""The types that the two releases compute differently, whatever their config.json states."""

_THETA = 3e5
"""A rope_theta that is no default, and not too large for the positions of the toys to matter."""


def rows() -> Iterator[Row]:
    """Compare toys of each type, SmolLM2, and the data about transformers 4."""
    version, out = ENVIRONMENT.version("transformers"), models.FOLDER / "logits-4"
    known = ENVIRONMENT.run("run_transformers.py", out, "--loads")[""]
    yield _data(version, known)
    bases = [*_bases(known)]
    grown = _grow(bases, "--legacy-config")
    results = ENVIRONMENT.run("run_transformers.py", out, "--loads", *bases, *grown.values())
    yield _warnings(version, bases, results)
    yield _legacy(version, grown, results)
    yield from _resaved(version, bases, out)
    yield from _smollm2(version, out)
    yield _freeze(version)


def _bases(known: Collection[str]) -> Iterator[Path]:
    """Save a toy of each type that transformers 4 has, with a rope_theta that is no default."""
    for name in families.known_types():
        family = families.family_of(name)
        if family is None or family.refused or name not in known:
            continue
        try:
            yield models.toy(name, label="-5", change=_set_theta)
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md lists these types
            continue


def _set_theta(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    for part in [rope, *rope.values()] if isinstance(rope, dict) else []:
        if isinstance(part, dict) and "rope_theta" in part:
            part["rope_theta"] = _THETA


def _grow(bases: list[Path], *options: str) -> dict[Path, Path]:
    """Grow models; those for which `run` refuses the layout are left out."""
    grown = {}
    for base in bases:
        try:
            grown[base] = models.grow(base, models.EVERY, *options)
        except ClientError:  # noqa: PERF203 - `make zoo` lists the reasons
            continue
    return grown


def _data(version: str, found: dict[str, dict[str, Any]]) -> Row:
    """Compare `transformers4.json` with the signatures of the config classes."""
    data = json.loads(transformers4.DATA.read_text(encoding="utf-8"))
    keys = {*legacy_config.ROTARY, *(k for names in data["renamed"].values() for k in names)}
    read = {
        name: {key: value for key, value in pairs.items() if key in keys}
        for name, pairs in found.items()
        if name in data["defaults"]
    }
    # A renamed key counts only for its type.
    wrong = [
        name
        for name, pairs in data["defaults"].items()
        if name not in read or not pairs.items() <= read[name].items()
    ]
    wrong += [n for n, p in found.items() if legacy_config.ROTARY.keys() & p and n not in read]
    result = f"wrong for {', '.join(wrong)}" if wrong else "equal"
    count = f"the defaults of {len(read)} types"
    return Row(NAME, version, count, "transformers4.json", result, wrong=bool(wrong))


def _warnings(version: str, bases: list[Path], results: dict[str, Any]) -> Row:
    """Compare the warning about a base of transformers 5 with what transformers 4 does."""
    missed, warned = [], 0
    for base in bases:
        config = models.config_of(base)
        says = legacy_config.warning(config, None) is not None
        warned += says
        if (
            not says
            and config["model_type"] not in _DIFFER
            and not _equal(base, results[str(base)])
        ):
            missed.append(config["model_type"])
    found = f"{warned} have a warning; the others are equal, except for {len(_DIFFER)} known types"
    result = f"no warning for {', '.join(missed)}" if missed else found
    ran = f"{len(bases)} toys written by transformers 5, with another rope_theta"
    return Row(NAME, version, ran, "logits, with the warning of `plan`", result, wrong=bool(missed))


def _legacy(version: str, grown: dict[Path, Path], results: dict[str, Any]) -> Row:
    """Compare models grown with --legacy-config with the base in transformers 5."""
    differ = {
        models.config_of(base)["model_type"]
        for base, out in grown.items()
        if not _equal(base, results[str(out)]) or not _close(_logits(base), _logits(out))
    }
    tokenizers = [
        r["tokenizer"] for r in map(results.get, map(str, grown.values())) if r.get("tokenizer")
    ]
    wrong = (differ ^ (_DIFFER & {models.config_of(b)["model_type"] for b in grown})) | {
        *tokenizers
    }
    expected = f"{len(grown) - len(differ)} equal in both; they differ, as known, for " + ", ".join(
        sorted(differ)
    )
    result = f"not as recorded: {', '.join(sorted(wrong))}" if wrong else expected
    ran = f"`run --legacy-config` of {len(grown)} of them, every 4"
    return Row(
        NAME,
        version,
        ran,
        "logits with the base's in transformers 5; tokenizer",
        result,
        wrong=bool(wrong),
    )


def _resaved(version: str, bases: list[Path], out: Path) -> Iterator[Row]:
    """Grow bases that transformers 4 wrote, and load the results with it."""
    folder = models.FOLDER / "saved-by-4"
    shutil.rmtree(folder, ignore_errors=True)
    ready = [
        models.grow(base, "append: 1", "--legacy-config") for base in bases if _is_common(base)
    ]
    saved = ENVIRONMENT.run("run_transformers.py", out, "--resave", folder, *ready)
    again = [folder / path.name for path in ready if "error" not in saved[str(path)]]
    grown = _grow(again)
    results = ENVIRONMENT.run("run_transformers.py", out, "--loads", *again, *grown.values())
    wrong = [
        base.name
        for base, deeper in grown.items()
        if not _close(_read(results[str(base)]), _read(results[str(deeper)]))
    ]
    result = f"different: {', '.join(wrong)}" if wrong else "equal"
    ran = f"{len(grown)} toys written by transformers 4, grown every 4"
    yield Row(NAME, version, ran, "logits with the base's", result, wrong=bool(wrong))


def _is_common(base: Path) -> bool:
    """Whether the type is one of those that people grow most."""
    common = (
        "llama mistral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 olmo2 smollm3 mixtral gpt2"
    )
    return models.config_of(base)["model_type"] in common.split()


def _smollm2(version: str, out: Path) -> Iterator[Row]:
    """Compare the perplexity of SmolLM2 as transformers 5 writes it, and with --legacy-config."""
    if not models.SMOLLM2.is_dir():
        raise ClientError(f"{models.SMOLLM2.name}: `make demo` makes it")
    plain = models.FOLDER / "SmolLM2-by-5"
    shutil.copytree(models.SMOLLM2, plain, dirs_exist_ok=True)
    models.rewrite_config(plain, lambda c: {k: v for k, v in c.items() if k != "rope_theta"})
    grown = models.grow(plain, "interleave: every 5", "--legacy-config")
    found = ENVIRONMENT.run("run_transformers.py", out, "--loads", plain, models.SMOLLM2, grown)
    by_5, demo, deeper = (
        found[str(p)].get("perplexity", -1) for p in (plain, models.SMOLLM2, grown)
    )
    text = (
        f"{by_5:.3f} if config.json is as transformers 5 writes it; {demo:.3f} for the base of "
        f"`make demo`; {deeper:.3f} grown with `--legacy-config`"
    )
    wrong = abs(deeper - demo) > 1e-3 * demo or by_5 < 1.01 * demo
    yield Row(NAME, version, "SmolLM2, every 5", "perplexity of a sentence", text, wrong=wrong)


def _freeze(version: str) -> Row:
    """Freeze the original layers in an environment without mergekit."""
    grown = models.grow(models.toy("llama"), models.EVERY, "--legacy-config")
    ran, compared = "`freeze_original_layers`, without mergekit", "trained layers"
    try:
        found = ENVIRONMENT.run("run_freeze.py", grown, package=True)
    except ClientError as error:
        return Row(NAME, version, ran, compared, str(error), wrong=True)
    right = found == {"layers": models.new_layers(grown), "others": []}
    return Row(NAME, version, ran, compared, "right" if right else f"{found}", wrong=not right)


def _equal(base: Path, result: dict[str, Any]) -> bool:
    """Whether transformers 4 computes what the base computes in transformers 5."""
    return (
        not result.get("missing") and "error" not in result and _close(_logits(base), _read(result))
    )


def _logits(path: Path) -> torch.Tensor:
    """Return what transformers 5 computes, from the same tokens."""
    return harness.logits(path, toys.tokens())


def _read(result: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.load(result["logits"]))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= models.CLOSE * one.abs().max())
