"""`gen`: generate the mergekit YAML of a directive, or its form in another tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands.inputs import DirectiveLike, Text
from mergekit_interleave.commands.recipe import Recipe
from mergekit_interleave.commands.tools import EXLLAMAV3, MERGEKIT, PEFT, TOOLS
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import registry
from mergekit_interleave.directive.mergekit_keys import EXPLICIT_KEYS
from mergekit_interleave.errors import DirectiveError, RefusedError, collected_warnings
from mergekit_interleave.planning import (
    exllamav3_layer_map,
    merge_stream,
    mergekit_support,
    peft_replication,
)
from mergekit_interleave.planning.resolve import Expansion, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_interleave.commands.inputs import Words

_FORMS: Mapping[str, Callable[[Expansion], str]] = {
    PEFT: peft_replication.lora_config,
    EXLLAMAV3: exllamav3_layer_map.layer_map,
}


def gen(
    directive: DirectiveLike | None = None,
    *,
    tool: str = MERGEKIT,
    allow_non_identity: bool = False,
    **words: Unpack[Words],
) -> Recipe:
    """Generate the mergekit YAML of a directive, ready for mergekit-yaml.

    In a multi-document file for mergekit-multi, the growth line of each document is expanded.

    Args:
        directive: Text, a path, an open file, a mapping, or a `Directive`.
        tool: The tool whose form is written: `mergekit`; `peft`, whose `LoraConfig` takes the
            result as its arguments; or `exllamav3`, whose `layer_map` is the result. The last two
            repeat layers of the base without storing them again.
        allow_non_identity: Accept a `zero` list with which the new layers are not identities.
        words: Keywords that take precedence over the directive; see `Words`.

    Returns:
        The YAML, for `peft` JSON, or for `exllamav3` one line, as a `str` with `warnings`.

    Raises:
        DirectiveError: The directive is invalid for every model.
        LayoutError: The directive does not fit the model.
        CheckpointError: The model must be read, but cannot be.
        RefusedError: The tool would build other layers.
    """
    if tool not in TOOLS:
        raise DirectiveError(
            f"unknown tool {tool!r}", hint=f"use {', '.join(TOOLS[:-1])} or {TOOLS[-1]}"
        )
    models = Models()
    source = inputs.read(directive)
    if tool == MERGEKIT and isinstance(source, Text) and merge_stream.is_stream(*source):
        _check_stream(source, has_flags=inputs.any_given(words))
        return Recipe(*merge_stream.expand(*source, models, allow_non_identity=allow_non_identity))
    wanted = inputs.parse(source, words)
    expansion = resolve(wanted, models, allow_non_identity=allow_non_identity)
    _check_kind(expansion, tool)
    with collected_warnings() as warnings:
        warnings.extend(expansion.warnings)
        if tool in _FORMS:
            return Recipe(_FORMS[tool](expansion), warnings)
        warnings.extend(mergekit_support.check(expansion))
    return Recipe(merge_stream.named(expansion.recipe, expansion.directive.name), warnings)


def _check_kind(expansion: Expansion, tool: str) -> None:
    """Refuse GGUF files, which none of the tools reads."""
    if expansion.is_gguf:
        model = expansion.layout.models[0]
        title = {PEFT: "PEFT", EXLLAMAV3: "ExLlamaV3"}.get(tool, "mergekit")
        raise RefusedError(
            f"{model}: is a GGUF file, and {title} reads none",
            hint="`mk-interleave run DIRECTIVE OUT.gguf` writes the grown GGUF file",
        )


def _check_stream(source: Text, *, has_flags: bool) -> None:
    """Check that a multi-document file contains a directive or a mergekit config.

    A model card also has several documents, and may contain neither.

    Raises:
        DirectiveError: It contains neither, or flags are given, which apply to a single directive.
    """
    documents = map(yaml_io.keys, yaml_io.documents(*source))
    merge_keys = {"merge_method", *EXPLICIT_KEYS}
    if not any(registry.has_line(keys) or merge_keys & keys.keys() for keys in documents):
        raise DirectiveError(
            f"{source.where}: contains neither a directive nor a mergekit config",
            hint="the shortest directive is `interleave: every 4`",
        )
    if has_flags:
        raise DirectiveError(f"{source.where}: flags cannot be combined with a multi-document file")
