"""What a model's directory says that it is: its recorded layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import CheckpointError, DirectiveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import manifest
from mergekit_interleave.output.manifest import Manifest


@dataclass(frozen=True)
class RecordedLayout:
    """What a directory says that it is.

    Attributes:
        directive: The layers.
        manifest: The interleave.json that says so, where it is one.
    """

    directive: Directive
    manifest: Manifest | None

    @property
    def layout(self) -> Layout:
        """The layers, with the scales of mergekit's top-level parameters.

        Raises:
            DirectiveError: The directive says them of no model in particular.
        """
        return mergekit_yaml.effective(self.spelled, self.directive.mergekit)

    @property
    def spelled(self) -> Layout:
        """The layers as the slices say them.

        Raises:
            DirectiveError: The directive says them of no model in particular.
        """
        if not isinstance(self.directive.growth, ExplicitSlices):
            raise DirectiveError(
                "a directive's layers depend on its model", hint="name it: --against MODEL"
            )

        def depth_of(_: ModelRef) -> int | None:
            return None

        return mergekit_yaml.from_document(self.directive.growth.document, depth_of)


def check_directory(directory: Path) -> None:
    """Check that a model's directory is one.

    Raises:
        CheckpointError: It is none.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file", hint="name the model's directory")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")


def read(directory: Path, file: Path | None = None) -> RecordedLayout:
    """Read what a directory says that it is.

    Args:
        directory: The model.
        file: What says it instead: an interleave.json, a mergekit config or a directive.

    Raises:
        CheckpointError: Nothing says it, or the interleave.json is broken.
        DirectiveError: The file is no directive.
    """
    names = (manifest.FILE, mergekit_yaml.FILE)
    found = file or next((directory / n for n in names if (directory / n).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{directory}: nothing says what it is: neither {names[0]} nor {names[1]} is there",
            hint="name the file that does: --recipe FILE",
        )
    if found.suffix == ".json":
        own = manifest.read(found)
        return RecordedLayout(own.directive, own)
    try:
        directive = directives.load_file(found)
    except DirectiveError as error:
        if file is not None:
            raise
        raise CheckpointError(str(error)) from error  # it is the model that is wrong
    if file is None and not isinstance(directive.growth, ExplicitSlices):
        raise CheckpointError(f"{found}: is no mergekit config")
    return RecordedLayout(directive, None)
