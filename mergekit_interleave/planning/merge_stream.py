"""Expand the documents with a growth line in a stream for mergekit-multi.

All other documents are passed through unchanged. A model may be the `name` of an earlier document;
its layers are then those of the result of that document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import NAME
from mergekit_interleave.directive.growth import registry
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.errors import DirectiveError, InterleaveError, Warn, collected_warnings
from mergekit_interleave.layout import layout as layouts
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout, Slice
from mergekit_interleave.planning import grown_config, mergekit_support
from mergekit_interleave.planning.resolve import resolve


def is_stream(text: str, where: str) -> bool:
    """Whether a text is a stream: several documents, or one named merge without a growth line.

    Text that is not valid YAML is not a stream.
    """
    try:
        documents = yaml_io.documents(text, where)
    except DirectiveError:
        return False  # the one-line form is not YAML; the parser reports other errors
    keys = yaml_io.keys(text)
    alone = NAME in keys and "merge_method" in keys
    return len(documents) > 1 or (alone and not registry.has_line(keys))


def expand(
    text: str, where: str, models: Models, *, allow_non_identity: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Expand the growth lines of a stream.

    Args:
        text: The stream.
        where: The name of the stream in errors.
        models: Opens models.
        allow_non_identity: Accept a `zero` list that does not zero all residual writers.

    Returns:
        The stream with slices in place of growth lines, and the warnings.

    Raises:
        InterleaveError: A document with a growth line cannot be expanded.
    """
    with collected_warnings() as warnings:
        stream = _Stream(where, models, warnings.append, allow_non_identity=allow_non_identity)
        expanded = "".join(stream.expanded(part) for part in yaml_io.documents(text, where))
        return expanded, tuple(dict.fromkeys(warnings))


def named(text: str, name: str | None) -> str:
    """Return a recipe with the name under which mergekit-multi stores its result."""
    return text if name is None else yaml_io.write({NAME: name}) + text


class _Stream:
    """Expands the documents of one stream, in order."""

    def __init__(self, where: str, models: Models, warn: Warn, *, allow_non_identity: bool) -> None:
        self._where, self._warn = where, warn
        self._allow_non_identity = allow_non_identity
        self._results = Results(where, models)
        self._count = 0

    def expanded(self, text: str) -> str:
        """Return one document, unchanged or with slices in place of its growth line."""
        self._count += 1
        place = f"{self._where}, document {self._count}"
        keys = yaml_io.keys(text)
        # A document without a merge method is a directive, possibly with a typo.
        if "merge_method" in keys and not registry.has_line(keys):
            self._results.learn(text, place)
            return text
        directive = directives.parse(text, place)
        try:
            expansion = resolve(
                directive, self._results.models, allow_non_identity=self._allow_non_identity
            )
            for warning in (*expansion.warnings, *mergekit_support.check(expansion)):
                self._warn(warning)
        except InterleaveError as error:
            error.args = (f"{place}: {error}",)
            raise
        self._results.remember(directive.name, expansion.layout, expansion.checkpoints)
        return begin(text) + named(expansion.recipe, directive.name) + end(text)


def begin(text: str) -> str:
    """Return the start marker of a document, or an empty string if it has none."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return "---\n" if next(lines, "").startswith(("---", "%")) else ""


def end(text: str) -> str:
    """Return the end marker of a document, or an empty string if it has none.

    The marker must precede any `%` directive.
    """
    return "...\n" if re.search(r"^\.\.\.\s*$", text, re.MULTILINE) else ""


class Results:
    """The results of the documents of a stream, which later documents may use as models.

    Args:
        where: The name of the stream.
        models: Opens models.

    Attributes:
        models: Opens models, including the results so far.
    """

    def __init__(self, where: str, models: Models) -> None:
        self._where, self.models = where, models

    def remember(
        self, name: str | None, layout: Layout, sources: Mapping[ModelRef, Checkpoint]
    ) -> None:
        """Record the result of a document.

        Args:
            name: The document's name.
            layout: Its layers.
            sources: The models of the layers that could be opened.
        """
        if name is None:
            return
        result = Checkpoint(
            ModelRef(ModelPath(name)),
            Path(self._where) / name,
            _config(layout, sources),
            is_local=False,
        )
        self.models = self.models.with_result(name, result)

    def learn(self, text: str, place: str) -> None:
        """Record the layers of an unchanged document, if later documents can refer to it."""
        with suppress(InterleaveError):
            document = yaml_io.read(text, place, directives.known_keys())
            name = document.get(NAME) if isinstance(document, dict) else None
            if isinstance(document, dict) and name is not None:
                grown = registry.has_line(document)
                layout = self._grown(document, place) if grown else self._layout(document)
                if layout is not None:
                    opened = {model: self.models.open_if_possible(model) for model in layout.models}
                    self.remember(str(name), layout, {m: c for m, c in opened.items() if c})

    def _grown(self, document: Mapping[Any, object], place: str) -> Layout | None:
        """Return the layers of a growth line, without their edits."""
        directive = directives.of_document(document, place)
        if directive.growth is None or (directive.needs_model and directive.model is None):
            return None

        def depth_of(model: ModelRef) -> int:
            return directive.layers or self.models.open(model).depth

        return layouts.expand(directive.growth, directive.model, depth_of)

    def _layout(self, document: Mapping[Any, object]) -> Layout | None:
        """Return the layers of the first source of each slice, or of the first model of a merge."""
        modules = document.get("modules")
        if isinstance(modules, Mapping):
            grown = modules.get(mergekit_yaml.GROWN) or next(iter(modules.values()), None)
            return self._layout(grown) if isinstance(grown, Mapping) else None
        slices = list(_slices(document))
        if slices:
            return Layout(tuple(slices))
        entries = document.get("models")
        stated = document.get("base_model")
        if stated is None and isinstance(entries, list) and entries:
            stated = entries[0].get("model") if isinstance(entries[0], Mapping) else None
        if stated is None:
            return None
        model = parse_model(stated, "model")
        return Layout((Slice(model, 0, self.models.open(model).depth),))


def _config(layout: Layout, sources: Mapping[ModelRef, Checkpoint]) -> Mapping[str, Any]:
    """Return the config.json of a result, or only its depth if a source cannot be read."""
    if all(model in sources for model in layout.models):
        with suppress(InterleaveError):
            return grown_config.grow(sources, layout).config()
    return {"num_hidden_layers": len(layout)}


def _slices(document: Mapping[Any, object]) -> Iterator[Slice]:
    entries = document.get("slices")
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"sources": [{"model": model, "layer_range": [int(start), int(stop)]}, *_]}:
                yield Slice(parse_model(model, "model"), start, stop)
