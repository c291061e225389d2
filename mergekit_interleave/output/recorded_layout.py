"""Read the layout that a model's directory records in interleave.json or mergekit_config.yml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave.checkpoint import adapter
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import CheckpointError, DirectiveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import lineage, manifest
from mergekit_interleave.output.manifest import Manifest


@dataclass(frozen=True)
class RecordedLayout:
    """The layout that a model's directory records.

    Attributes:
        directive: The directive that describes the layers.
        manifest: The interleave.json that records them; None if another file does.
    """

    directive: Directive
    manifest: Manifest | None

    @property
    def layout(self) -> Layout:
        """The layers, including the scales of mergekit's top-level parameters.

        Raises:
            DirectiveError: The directive is a growth line, whose layers depend on the model.
        """
        return mergekit_yaml.effective(self.as_written, self.directive.mergekit)

    def since(self, name: str | None) -> Layout:
        """Return the layers; if a model is named, all are new that it does not have.

        Args:
            name: A model in the lineage: its name in interleave.json, a Hub id, or a path.

        Raises:
            DirectiveError: The lineage has no such model, or is not recorded.
        """
        if name is None:
            return self.layout
        if self.manifest is None:
            raise DirectiveError(
                f"--since: the lineage is not recorded, because there is no {manifest.FILE}",
                hint=f"name the {manifest.FILE} of the expansion: --recipe FILE",
            )
        return lineage.since(self.manifest.content, name)

    @property
    def as_written(self) -> Layout:
        """The layers as the slices list them.

        Raises:
            DirectiveError: The directive is a growth line, whose layers depend on the model.
        """
        if not isinstance(self.directive.growth, ExplicitSlices):
            raise DirectiveError(
                "the layers of a directive depend on its model",
                hint="name the model: --against MODEL",
            )

        def depth_of(_: ModelRef) -> int | None:
            return None

        return mergekit_yaml.from_document(self.directive.growth.document, depth_of)


def check_directory(directory: Path) -> None:
    """Check that a model's directory exists.

    Raises:
        CheckpointError: It is missing, is a file, or holds a LoRA that is not merged.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file", hint="name the model's directory")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    adapter.check_merged(directory)


def read(directory: Path, file: Path | None = None) -> RecordedLayout:
    """Read the layout that a directory records.

    Args:
        directory: The model.
        file: Another file that records it: an interleave.json, a mergekit config or a directive;
            or the directory of a model that records it.

    Raises:
        CheckpointError: The directory records no layout, or its record is malformed.
        DirectiveError: The file is not a directive.
    """
    names = (manifest.FILE, mergekit_yaml.FILE)
    if file is not None and file.is_dir():
        return read(file)
    record = file or next((directory / n for n in names if (directory / n).is_file()), None)
    if record is None:
        raise CheckpointError(
            f"{directory}: does not record that it was grown: it has neither {names[0]} nor "
            f"{names[1]}",
            hint="for the output of a trainer, name the model that was trained: --recipe FILE; "
            f"a base must be grown first: mk-interleave run 'append: 1' OUT --model {directory}",
        )
    if record.suffix == ".json":
        parsed = manifest.read(record)
        return RecordedLayout(parsed.directive, parsed)
    try:
        directive = directives.load_file(record)
    except DirectiveError as error:
        if file is not None:
            raise
        raise CheckpointError(str(error)) from error  # the file belongs to the model
    if file is None and not isinstance(directive.growth, ExplicitSlices):
        raise CheckpointError(f"{record}: is not a mergekit config")
    return RecordedLayout(directive, None)
