"""Warn of programs that read the result otherwise than transformers 5 does."""

from __future__ import annotations

from mergekit_interleave.checkpoint.checkpoint import Checkpoint, config_errors
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.planning import legacy_config, llama_cpp
from mergekit_interleave.planning.grown_config import GrownConfig


def client_warnings(
    grown: GrownConfig, base: Checkpoint, directive: Directive, *, legacy: bool = False
) -> tuple[str, ...]:
    """Return one sentence for each program that would misread the result.

    Args:
        grown: The config.json of the result.
        base: The model that config, tokenizer and small files are taken from.
        directive: The directive of the result.
        legacy: Whether the files are also written for transformers 4.
    """
    with config_errors(base.path):
        misread = None if legacy else _by_transformers_4(base, directive)
        return tuple(filter(None, (misread, llama_cpp.warning(grown, directive))))


def _by_transformers_4(base: Checkpoint, directive: Directive) -> str | None:
    rebuilt = mergekit_yaml.changes_tokenizer(directive.mergekit)
    tokenizer = None if rebuilt else legacy_config.tokenizer_of(base.path)
    found = legacy_config.warning(base.config, tokenizer)
    return found and f"{found}; `run {legacy_config.FLAG}` writes what it reads, too"
