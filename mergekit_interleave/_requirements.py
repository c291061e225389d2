"""Compare the installed packages with what this project requires.

`freeze_original_layers` works where some of them are missing or old, for example in the environment
of a trainer. Everything else names them.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from mergekit_interleave.errors import RequirementError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PROJECT = "mergekit-interleave"


class Unmet(NamedTuple):
    """A required package that is missing or has another release.

    Attributes:
        name: The name of the package.
        wanted: The requirement, such as `transformers<6,>=5.0`.
        found: The installed release, or None.
    """

    name: str
    wanted: str
    found: str | None

    def __str__(self) -> str:
        return f"{self.wanted} ({f'found {self.found}' if self.found else 'not installed'})"


def unmet() -> list[Unmet]:
    """Return the requirements that the environment does not meet."""
    try:
        from packaging.requirements import Requirement  # noqa: PLC0415 - transformers requires it

        wanted = [Requirement(line) for line in metadata.requires(_PROJECT) or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    needed = [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    return [found for each in needed if (found := _unmet(each)) is not None]


def _unmet(wanted: Requirement) -> Unmet | None:
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        version = None
    if version is not None and wanted.specifier.contains(version, prereleases=True):
        return None
    return Unmet(wanted.name, f"{wanted.name}{wanted.specifier}", version)


def error_of(found: list[Unmet]) -> RequirementError:
    """Return the error that names unmet requirements; there must be at least one."""
    return RequirementError(
        f"mergekit-interleave needs {', '.join(map(str, found))}",
        hint="in an environment of its own: pip install "
        + " ".join(repr(each.wanted) for each in found),
    )


def check(*names: str) -> None:
    """Check that some required packages are installed with a release that this project supports.

    Raises:
        RequirementError: One is missing or has another release.
    """
    if found := [each for each in unmet() if each.name in names]:
        raise error_of(found)


def check_extra(wanted: str) -> None:
    """Check that the package of an extra is installed with a release that this project supports.

    Args:
        wanted: The requirement, such as `ray>=2.50`.

    Raises:
        RequirementError: It is missing or has another release.
    """
    from packaging.requirements import Requirement  # noqa: PLC0415 - transformers requires it

    if found := _unmet(Requirement(wanted)):
        raise RequirementError(f"this needs {found}", hint=f"pip install {found.wanted!r}")
