"""`explain`: a mergekit config as the shortest directive that expands to the same slices.

A config comes as YAML, as a model card that shows it, or as the directory of a model. Of a stream
the documents that are no passthrough merge stay as they are. The network is never asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from mergekit_interleave import architecture, describe, notation, recipe, yamltext
from mergekit_interleave import directive as directives
from mergekit_interleave.checkpoint import Checkpoint, interpreted
from mergekit_interleave.edits import edit_of
from mergekit_interleave.errors import CheckpointError, DirectiveError, InterleaveError
from mergekit_interleave.expand import Models
from mergekit_interleave.growth import Spelled
from mergekit_interleave.layout import Layout
from mergekit_interleave.patterns import Known, directives_of
from mergekit_interleave.reference import ModelRef
from mergekit_interleave.scaling import AUTO, GAINS

CARD = "README.md"

_SPELLED = ("slices", "models", "modules")


def explain(source: str, stdin: IO[str]) -> str:
    """The text of the shortest directive, with a sentence of what it does as a comment.

    Args:
        source: A file, a model's directory, or `-`.
        stdin: Standard input.

    Raises:
        InterleaveError: There is no passthrough config in it.
    """
    text, where = _read(source, stdin)
    if _FENCE.search(text):
        text, where = _fenced(text, where), f"{where}, in its block of YAML"
    documents = _documents(text)
    if len(documents) <= 1:  # or it is the one-line form, or no YAML, which is said later
        return _explained(text, where)
    return "".join(_part_of_stream(part, where) for part in documents)


def _read(source: str, stdin: IO[str]) -> tuple[str, str]:
    path = Path(source)
    if source != "-" and path.is_dir():
        for name in (recipe.FILE, CARD):
            if (path / name).is_file():
                return directives.read_text(str(path / name), stdin)
        raise CheckpointError(
            f"{source}: has neither {recipe.FILE} nor a {CARD} that would tell its layers"
        )
    return directives.read_text(source, stdin)


_FENCE = re.compile(r"^[ \t>]*(```|~~~)", re.MULTILINE)
_BLOCK = re.compile(r"^([ \t>]*)(```+|~~~+)[^\n]*\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)


def _fenced(card: str, where: str) -> str:
    """The first block of a card that is a passthrough merge."""
    for block in _BLOCK.finditer(card):
        lines = block[3].splitlines(keepends=True)
        text = "".join(line.removeprefix(block[1]) for line in lines)
        if any(_is_passthrough(yamltext.keys(part)) for part in _documents(text)):
            return text
    raise DirectiveError(f"{where}: no block in it is the YAML of a passthrough merge")


def _documents(text: str) -> list[str]:
    try:
        return yamltext.documents(text, "")
    except DirectiveError:
        return []


def _is_passthrough(keys: Mapping[str, str | None]) -> bool:
    spelled = any(key in keys for key in _SPELLED)
    grown = any(key in keys for key in notation.KEYS)
    return spelled and not grown and keys.get("merge_method", "passthrough") == "passthrough"


def _part_of_stream(text: str, where: str) -> str:
    keys = yamltext.keys(text)
    if not _is_passthrough(keys):
        return text
    begins = "---\n" if text.lstrip().startswith("---") else ""
    name = {} if keys.get("name") is None else {"name": keys["name"]}
    return begins + _explained(text, where, name)


def _explained(text: str, where: str, named: Mapping[str, object] | None = None) -> str:
    """One document, with what names it in a stream."""
    document = yamltext.read(text, where, directives.KNOWN)
    if named and isinstance(document, dict):
        document = {key: value for key, value in document.items() if key not in named}
    directive = directives.of_document(document, where)
    if not isinstance(directive.growth, Spelled):
        return text  # a directive already
    models = _Opened()
    layout = recipe.from_document(directive.growth.document, models.depth)
    found = list(directives_of(layout, models.known(layout)))
    if not _modules_return(directive.growth, layout, models):
        found = []
    keys = {**(named or {}), **directive.mergekit}
    best, written = min(
        (
            (one, yamltext.write_lines({**one.to_document(), **keys}))
            for one in found or [directive]
        ),
        key=lambda choice: len(choice[1]),
    )
    growth = None if best is directive else best.growth
    depth = models.depth(layout.models[0]) or best.layers
    comment = f"# {describe.sentence(layout, growth, depth)}\n"
    return min((comment + written, written, text), key=lambda choice: len(choice) > len(text))


def _modules_return(growth: Spelled, layout: Layout, models: _Opened) -> bool:
    """Whether a directive gets the modules back that a config spells out."""
    if "modules" not in growth.document:
        return True
    checkpoint = models.open(layout.models[0])
    return checkpoint is not None and bool(checkpoint.modules)


class _Opened:
    """What can be known of models without asking the network."""

    def __init__(self) -> None:
        self._models = Models(cached_only=True)

    def open(self, model: ModelRef) -> Checkpoint | None:
        try:
            return self._models.open(model)
        except CheckpointError:
            return None

    def depth(self, model: ModelRef) -> int | None:
        checkpoint = self.open(model)
        try:
            return None if checkpoint is None else checkpoint.depth
        except InterleaveError:
            return None

    def known(self, layout: Layout) -> Known:
        edits = {}
        checkpoint = self.open(layout.models[0])
        if checkpoint is not None and checkpoint.family is not None:
            for word in (AUTO, GAINS):
                with suppress(InterleaveError), interpreted(checkpoint.path):
                    edit = edit_of(word, checkpoint)
                    if edit is not None:
                        edits[word] = edit
        return Known(
            depths={model: self.depth(model) for model in layout.models},
            closes=self._closes,
            edits=edits,
        )

    def _closes(self, model: ModelRef, names: tuple[str, ...]) -> bool:
        checkpoint = self.open(model)
        family = architecture.assumed_family() if checkpoint is None else checkpoint.family
        return family is not None and not family.constants and {*names} == {*family.zero}
