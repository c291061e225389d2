"""`explain`: find the shortest directive that expands to the same slices as a mergekit config.

The config may be a YAML file, a model card that contains it, or the directory of a model. In a
stream, that is, a file of several documents, those that are not passthrough merges stay unchanged.
The network is never used.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from mergekit_interleave import _out_files
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import gguf
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.commands.recipe import Recipe
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import linear, yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, registry
from mergekit_interleave.directive.mergekit_keys import EXPLICIT_KEYS, METHOD
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import AUTO, NORMS
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    Warn,
    collected_warnings,
)
from mergekit_interleave.gguf.header import is_gguf
from mergekit_interleave.layout import describe, mergekit_yaml
from mergekit_interleave.output import manifest
from mergekit_interleave.planning import merge_stream, zeroing
from mergekit_interleave.planning.shortest import KnownModels

CARD = _out_files.CARD


def explain(source: StrPath | IO[str], stdin: IO[str] | None = None) -> Recipe:
    """Find the shortest directive that expands to the same slices as a mergekit config.

    Args:
        source: A file name, a model's directory, or an open file.
        stdin: The file that `-` stands for.

    Returns:
        The directive, preceded by a comment that describes it; a `str` with `warnings`.

    Raises:
        InterleaveError: The source contains no passthrough config.
    """
    with collected_warnings() as warnings:
        if isinstance(source, str | os.PathLike) and is_gguf(os.fspath(source)):
            text = gguf.explain(Path(source))
        elif isinstance(source, str | os.PathLike):
            text = _explain(os.fspath(source), stdin or io.StringIO(), warnings.append)
        else:
            text = _explain("-", source, warnings.append)
    return Recipe(text, warnings)


def _explain(source: str, stdin: IO[str], warn: Warn) -> str:
    text, where, stored = _read(source, stdin)
    documents = _documents(text)
    keys_of_each = [yaml_io.keys(part) for part in documents]
    is_card = _is_card(where, keys_of_each)
    ours = not is_card and any(_is_ours(keys) for keys in keys_of_each)
    has_fence = _FENCE.search(text) is not None
    if len(documents) > 1 and not (is_card or ours or has_fence or _has_merge(keys_of_each)):
        raise DirectiveError(f"{where}: none of its documents is a mergekit config")
    if is_card or (has_fence and not ours):
        text, where = _fenced(text, where, warn), f"{where}, in its YAML block"
        documents = _documents(text)
    models = _Opened(where, warn)
    # One document, the one-line form, or invalid YAML, which `_explained` reports.
    if len(documents) <= 1:
        return _explained(text, where, models, stored)
    return "".join(_part_of_stream(part, where, models) for part in documents)


def _read(source: str, stdin: IO[str]) -> tuple[str, str, Directive | None]:
    """Return the text, its name in errors, and the directive that `run` stored with it, if any."""
    path = Path(source)
    if source != "-" and path.is_dir():
        for name in (mergekit_yaml.FILE, CARD):
            if (path / name).is_file():
                return *directives.read_text(str(path / name), stdin), _stored(path)
        raise CheckpointError(
            f"{source}: contains neither {mergekit_yaml.FILE} nor {CARD}, so its layers are unknown"
        )
    return *directives.read_text(source, stdin), None


def _stored(directory: Path) -> Directive | None:
    """Return the directive in interleave.json if its growth line depends on the model's depth."""
    file = directory / manifest.FILE
    if not file.is_file():
        return None
    with suppress(InterleaveError):
        stored = manifest.read(file).content["directive"]
        directive = directives.of_document(stored, str(file))
        # Any other directive can be derived from the slices alone.
        needed = directive.growth is not None and directive.growth.needs_depth
        return directive if needed else None
    return None


def _is_card(where: str, documents: Sequence[Mapping[str, str | None]]) -> bool:
    """Return whether a text is a model card: front matter and prose, with YAML in code blocks only.

    Args:
        where: The name of the text.
        documents: The keys of each of its YAML documents; prose has none.
    """
    return where.endswith(".md") or not all(documents)


_FENCE = re.compile(r"^([ \t>]*)(```+|~~~+)", re.MULTILINE)


def _fenced(card: str, where: str, warn: Warn) -> str:
    """Return the text of the first code block of a card that contains a passthrough merge."""
    merges = [text for text in _blocks(card) if any(map(_is_passthrough, _documents(text)))]
    if not merges:
        raise DirectiveError(
            f"{where}: none of its code blocks is the YAML of a passthrough merge",
            hint="name a mergekit YAML, or a model that `run` or mergekit-yaml wrote",
        )
    if len(set(merges)) > 1:
        warn(f"{where}: has {len(set(merges))} passthrough merges; only the first is explained")
    return merges[0]


def _blocks(card: str) -> Iterator[str]:
    """Yield the text of each fenced block of a card."""
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in card.splitlines(keepends=True):
        fence = _FENCE.match(line)
        if opened is None:
            opened, lines = fence, []
        elif fence and line.strip(" \t>\r\n") == fence[2] and fence[2].startswith(opened[2]):
            yield "".join(lines)
            opened = None
        else:
            lines.append(line.removeprefix(opened[1]))


def _documents(text: str) -> list[str]:
    """Split a stream into its documents; return an empty list if it is not valid YAML."""
    try:
        return yaml_io.documents(text, "")
    except DirectiveError:
        return []


def _has_merge(documents: Iterable[Mapping[str, str | None]]) -> bool:
    return any("merge_method" in keys for keys in documents)


def _is_ours(keys: Mapping[str, str | None]) -> bool:
    """Return whether a document with these keys can be a directive."""
    return registry.has_line(keys) or _has_explicit_slices(keys)


def _has_explicit_slices(keys: Mapping[str, str | None]) -> bool:
    """Return whether a document with these keys lists its layers, as a mergekit config does."""
    return any(key in keys for key in EXPLICIT_KEYS)


def _is_passthrough(text: str) -> bool:
    """Return whether a document is a passthrough merge, or a linear one that `gen` has written."""
    keys = yaml_io.keys(text)
    lists_slices = _has_explicit_slices(keys) and not registry.has_line(keys)
    method = keys.get(METHOD, "passthrough")
    if lists_slices and method == linear.LINEAR:
        document = yaml_io.read(text, "")
        return isinstance(document, dict) and linear.as_passthrough(document) is not document
    return lists_slices and method == "passthrough"


def _part_of_stream(text: str, where: str, models: _Opened) -> str:
    """Explain one document of a stream, or return it unchanged if that is not possible."""
    written = text
    if _is_passthrough(text):
        try:
            written = _explained(text, where, models)
        except CheckpointError as error:  # a single document would be refused
            models.warn(f"{error}; the document is left unchanged")
    models.results.learn(text, where)
    return text if written == text else merge_stream.begin(text) + written + merge_stream.end(text)


def _explained(text: str, where: str, models: _Opened, stored: Directive | None = None) -> str:
    """Explain one document; use the stored directive if its slices match no growth line."""
    document = yaml_io.read(text, where, directives.known_keys())
    if not isinstance(document, dict):
        raise DirectiveError(
            f"{where}: is neither a mergekit config nor a model card that contains one"
        )
    directive = directives.of_document(document, where)
    for warning in directive.warnings:
        models.warn(warning)
    if not isinstance(directive.growth, ExplicitSlices):
        return text.rstrip() + "\n"  # it is a directive already
    layout = mergekit_yaml.from_document(directive.growth.document, models.known_depth)
    known = KnownModels(models.open, models.depth)
    best = known.shortest(layout, directive.growth) or stored or directive
    written = yaml_io.write_lines(_with_keys(best, directive).to_document())
    growth = None if best is directive else best.growth
    depth = models.depth(layout.models[0]) or best.layers
    identities = zeroing.identities(layout, models.family)
    if best is stored and stored.zero_rule in (AUTO, NORMS):
        identities = frozenset(layer.index for layer in layout.new_layers)
    sentence = describe.sentence(layout, growth, depth, identities)
    # In a stream, the markers before and after a document are added to the result.
    limit = len(text) - len(merge_stream.begin(text)) - len(merge_stream.end(text))
    comments = (f"# {sentence}\n", f"# {sentence.rpartition(': ')[2]}\n", "")
    choices = (*(comment + written for comment in comments), text)
    return min(choices, key=lambda choice: len(choice) > limit)


def _with_keys(found: Directive, written: Directive) -> Directive:
    """Return a found directive with the name and mergekit's keys of the written one."""
    return replace(found, mergekit=written.mergekit, name=written.name)


class _Opened:
    """Information about models that is available without the network.

    Args:
        where: The name of the input. The documents of a stream may use earlier ones as models.
        warn: Called with each warning.
    """

    def __init__(self, where: str, warn: Warn) -> None:
        self.warn = warn
        self.results = merge_stream.Results(where, Models(cached_only=True))

    def open(self, model: ModelRef) -> Checkpoint | None:
        return self.results.models.open_if_possible(model)

    def depth(self, model: ModelRef) -> int | None:
        return self.results.models.depth_if_known(model)

    def known_depth(self, model: ModelRef) -> int:
        """Return the depth; raise an error if it is unknown."""
        depth = self.depth(model)
        if depth is None:
            raise CheckpointError(
                f"{model}: its number of layers is unknown, and the config takes whole models",
                hint="make its config.json available, in a directory or in the Hub's cache",
            )
        return depth

    def family(self, model: ModelRef) -> families.Family:
        """Return the family of a model, or an assumed one if it is unknown."""
        checkpoint = self.open(model)
        known = None if checkpoint is None else checkpoint.family
        return known or families.assumed_family()
