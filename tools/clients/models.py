"""Toys, SmolLM2 and the models grown from them, each made once per run."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import toys
import zoo
from harness import tokenizer
from transformers import AutoModelForCausalLM

from clients.environment import CACHE, ROOT, ClientError

EVERY = "interleave: every 4"
CACHE.mkdir(parents=True, exist_ok=True)
FOLDER = Path(tempfile.mkdtemp(prefix="models-", dir=CACHE))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
SMOLLM2 = Path(os.environ.get("MK_INTERLEAVE_SMOLLM2", ROOT / ".cache" / "SmolLM2-135M-Instruct"))
CLOSE = 1e-5
"""The largest difference of two logits, relative to the largest logit, that counts as equal."""


zoo.quiet()


def toy(name: str, *, label: str = "", change: Callable[[Any], object] | None = None) -> Path:
    """Save a toy with a tokenizer.

    Args:
        name: Its type; see the `toys` of the tests.
        label: A part of the name of its directory, if the config is changed.
        change: Changes the config.

    Raises:
        Exception: transformers cannot build it.
    """
    path = FOLDER / f"{name}{label}".replace(":", "-")
    if path.exists():
        return path
    config = toys.config(name)
    if change is not None:
        change(config)
    toys.animated(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(path)
    tokenizer(128).save_pretrained(path)
    return path


def grow(base: Path, directive: str = EVERY, *options: str) -> Path:
    """Grow a model with `run`.

    Raises:
        ClientError: `run` refuses it.
    """
    return _grown(base, directive, options)


@cache
def _grown(base: Path, directive: str, options: tuple[str, ...]) -> Path:
    out = FOLDER / f"{base.name}-grown-{len(list(FOLDER.glob('*-grown-*')))}"
    status, err = zoo.mk(
        "run", directive, str(out), "--model", str(base), "--engine", "stream", *options
    )
    if status:
        raise ClientError(next(line for line in err.splitlines() if line.startswith("error")))
    return out


def config_of(path: Path) -> dict[str, Any]:
    """Return the config.json of a model."""
    content: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return content


def rewrite_config(path: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Replace the config.json of a model."""
    text = json.dumps(change(config_of(path)), indent=2)
    (path / "config.json").write_text(text, encoding="utf-8")


def new_layers(path: Path) -> list[int]:
    """Return the indices of the new layers that interleave.json records."""
    content = json.loads((path / "interleave.json").read_text(encoding="utf-8"))
    return [index for index, layer in enumerate(content["layers"]) if layer["new"]]
