"""The base classes of growth lines: `Growth` is the meaning of a line, `Line` its syntax."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive.layer_range import unknown_depth
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import NONE
from mergekit_interleave.errors import DirectiveError

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern, Summary
    from mergekit_interleave.directive.growth.stack import Step

Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
"""Half-open ranges of layer indices."""

Depths: TypeAlias = "Callable[[ModelRef], int | None]"
"""Returns the number of layers of a model, or None if it is unknown."""

Named: TypeAlias = "Callable[[object, str], ModelRef]"
"""Returns the model for a name or short name; the string names the key in error messages."""

Schema: TypeAlias = "dict[str, Any]"
"""A part of the JSON Schema of directives."""


class Growth(ABC):
    """The meaning of a growth line, as a frozen value."""

    default_zero: ClassVar[str] = NONE
    """The value of `zero` if the directive does not state it."""

    @property
    def needs_model(self) -> bool:
        """Whether some of its layers come from the directive's own `model`."""
        return True

    @property
    def needs_depth(self) -> bool:
        """Whether its slices depend on the number of layers of a model."""
        return True

    @property
    def edits_itself(self) -> bool:
        """Whether the line itself states the edits or the models of its layers."""
        return False

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that the line itself names, in order."""
        return ()

    @property
    def damping(self) -> int:
        """The number by which the updates of all repeated layers are divided; 1 if they are not."""
        return 1

    @property
    def warning(self) -> str | None:
        """What the result only approximates, whatever the model; None if it is exact."""
        return None

    @abstractmethod
    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the slices of the new model, each as the start and stop of its source layers.

        Args:
            depth: The number of layers of the source model.
            model: The source model, for error messages.

        Raises:
            LayoutError: The line does not fit this depth.
        """

    def slices(
        self, model: ModelRef | None, depth_of: Depths
    ) -> Iterator[tuple[ModelRef, int, int, Step | None]]:
        """Yield the slices of the new model: source model, start, stop, and the step that edits it.

        Args:
            model: The source model, or None if the line names its own models.
            depth_of: Returns the number of layers of a model.

        Raises:
            LayoutError: The line does not fit this depth, or needs a depth that is unknown.
        """
        if model is None:
            raise TypeError("a growth line without a model")
        depth = depth_of(model)
        if depth is None:
            raise unknown_depth(model, "the growth line depends on it")
        for start, stop in self.ranges(depth, model):
            yield model, start, stop, None

    @abstractmethod
    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return the growth line as a YAML mapping.

        Args:
            called: Returns the name or short name of a model.
        """

    def sentence(self, made: Summary) -> str | None:
        """Describe the result, or return None if the layout alone determines the sentence."""
        del made
        return None

    def why_unchanged(self, depth: int) -> str:
        """Return the error message for a line that changes nothing."""
        return f"the directive changes nothing: the result has the same {depth} layers"


def _no_proposal(pattern: Pattern) -> Iterator[Growth]:
    del pattern
    return iter(())


class Flag(NamedTuple):
    """A command-line flag for a growth line.

    Attributes:
        name: The name without the dashes.
        metavar: The placeholder for the value in the help.
        help: What the flag does, in one sentence.
        read: Parses the value, given its text and its name in error messages. None if the value
            has the same form as in YAML, either as text or in brackets.
        in_yaml: The same in YAML, if the name of the flag is not a key.
        repeatable: Whether the flag may be given several times, each time with more list entries.
    """

    name: str
    metavar: str
    help: str
    read: Callable[[str, str], Growth] | None = None
    in_yaml: str = ""
    repeatable: bool = False


class Line(NamedTuple):
    """The syntax of a growth line.

    Attributes:
        key: Its key in YAML.
        read: Parses the YAML value of the key. Takes the value, its name in error messages, and
            `Named`. Raises DirectiveError if the value is invalid.
        schema: Returns the JSON Schema of the value, with a `description`.
        flags: Its flags.
        definitions: Returns further definitions for `$defs` of the schema.
        propose: Yields growths that may produce the given slices of one model. A proposal may be
            wrong, because each one is expanded and compared with the slices.
        proposes_several_models: Whether `propose` also accepts slices of several models.
    """

    key: str
    read: Callable[[object, str, Named], Growth]
    schema: Callable[[], Schema]
    flags: tuple[Flag, ...] = ()
    definitions: Callable[[], Schema] = dict
    propose: Callable[[Pattern], Iterator[Growth]] = _no_proposal
    proposes_several_models: bool = False


def positive(value: object, where: str) -> int:
    """Read a positive whole number.

    Raises:
        DirectiveError: The value is not a positive whole number.
    """
    return _at_least(1, value, where)


def index(value: object, where: str) -> int:
    """Read the index of a layer.

    Raises:
        DirectiveError: The value is not a whole number from 0.
    """
    return _at_least(0, value, where)


def _at_least(least: int, value: object, where: str) -> int:
    number = _whole(value, where)
    if number < least:
        raise DirectiveError(f"{where}: must be at least {least}, found {number}")
    return number


def _whole(value: object, where: str) -> int:
    digits = 18  # converting longer numbers is slow, and no depth is that large
    if isinstance(value, str) and re.fullmatch(rf"\s*[+-]?\d{{1,{digits}}}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**digits:
        return value
    raise DirectiveError(f"{where}: expected a whole number, found {value!r:.200}")


def not_empty(start: int, stop: int) -> Ranges:
    """Return the range in a tuple, or an empty tuple if the range is empty."""
    return ((start, stop),) if start < stop else ()


COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_LAYERS}
"""The schema of a number of layers."""


def ref(name: str) -> Schema:
    """Return a reference to the schema with this name in `$defs`."""
    return {"$ref": f"#/$defs/{name}"}


def any_of(*schemas: Schema) -> Schema:
    """Return a schema that accepts every value that at least one of these schemas accepts."""
    return {"anyOf": list(schemas)}
