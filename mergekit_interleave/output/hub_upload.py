"""Send files to a repository of the Hugging Face Hub.

huggingface_hub does all transfers; its token, endpoint and offline settings apply. All files are
in one commit, so a repository never holds a part of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._stored_tensor import Stamp
from mergekit_interleave._version import __version__
from mergekit_interleave.checkpoint import hub
from mergekit_interleave.errors import DirectiveError, OutputError, UnreachableError

MAIN = "main"
"""The branch of every repository."""

_BRANCH = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))[A-Za-z0-9_][\w.+/-]*(?<![./])", re.ASCII)
"""The names of branches that both git and the Hub accept."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Target:
    """The place that files are sent to.

    Attributes:
        repo: The Hub id of the repository.
        revision: The branch; it is created if it does not exist.
        private: Whether the repository must be private.
    """

    repo: str
    revision: str = MAIN
    private: bool = False

    def check(self) -> None:
        """Check the names.

        Raises:
            DirectiveError: The Hub accepts no such name.
        """
        if self.repo.count("/") != 1 or not hub.is_hub_id(self.repo):
            raise DirectiveError(
                f"{self.repo!r} is not the id of a Hub repository",
                hint="name it ORG/NAME, of letters, digits, '-', '_' and '.'",
            )
        if not _BRANCH.fullmatch(self.revision) or _COMMIT.fullmatch(self.revision):
            raise DirectiveError(
                f"--revision: {self.revision!r} is not the name of a branch",
                hint=f"name a branch, such as {MAIN} or v2",
            )


def check_online() -> None:
    """Check, before anything is read, that the Hub may be asked and that there is a token.

    Raises:
        UnreachableError: The settings forbid it.
        OutputError: There is no token.
    """
    from huggingface_hub import constants, get_token  # noqa: PLC0415 - takes a moment

    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(
            "the Hub is not asked in offline mode", hint="unset HF_HUB_OFFLINE, or pass --dry-run"
        )
    if get_token() is None:
        raise OutputError(
            "there is no token for the Hub", hint="`hf auth login` stores one; or set HF_TOKEN"
        )


def send(files: Mapping[str, Path], target: Target) -> str:
    """Send files in one commit. The repository and the branch are created if they do not exist.

    Args:
        files: The files, by their names in the repository.
        target: The place to send them to.

    Returns:
        The address of the commit; of the latest one if the repository has these files already.

    Raises:
        UnreachableError: The Hub cannot be reached.
        OutputError: The Hub refuses the files, or a file has changed while it was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415
    from huggingface_hub.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()
    api = HfApi(library_name="mergekit-interleave", library_version=__version__)
    stamps = {path: Stamp.of(path.stat()) for path in files.values()}
    with _explained(target), hub.progress_bars():
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        if target.private:
            _check_private(api, target)
        if target.revision != MAIN:
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        commit: Any = api.create_commit(
            target.repo,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message=f"Upload a model with mergekit-interleave {__version__}",
            revision=target.revision,
        )
    for path, stamp in stamps.items():
        if not path.exists() or Stamp.of(path.stat()) != stamp:
            raise OutputError(
                f"{path}: changed while it was sent",
                hint="send the model again: repeat the command",
            )
    return str(commit.commit_url)


def _check_private(api: Any, target: Target) -> None:
    """Check that the repository is private, because one that existed is left as it was."""
    if not api.repo_info(target.repo).private:
        raise OutputError(
            f"{target.repo}: exists and is public",
            hint="make it private in its settings on the Hub, or leave out --private",
        )


@contextmanager
def _explained(target: Target) -> Iterator[None]:
    """Turn each error of huggingface_hub into one of this project."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason, hint = _REFUSALS.get(status, (f"the Hub answered with status {status}", _AGAIN))
        detail = f"{target.repo}: {reason}: {_line(error.server_message)}".removesuffix(": ")
        raise OutputError(detail, hint=hint) from error
    except (OSError, RuntimeError, errors.HTTPError) as error:
        if isinstance(error, OSError) and error.filename:
            raise OutputError(f"{error.filename}: {error.strerror}") from error
        raise UnreachableError(
            f"{target.repo}: not sent: {_line(error)}",
            hint=f"check the connection and HF_ENDPOINT; then {_AGAIN}",
        ) from error
    except ValueError as error:  # such as metadata of the card that the Hub does not accept
        raise OutputError(f"{target.repo}: not sent: {_line(error)}") from error


def _line(words: object) -> str:
    """Return the words of an error as one short line."""
    return " ".join(str(words or "").split())[:300]


_AGAIN = "repeat the command: what the Hub has received is not sent again"
_WRITE = "pass a token with write access: `hf auth login`, or HF_TOKEN"
_REFUSALS = {
    400: ("the Hub refuses the request", None),
    401: ("the Hub does not accept the token", _WRITE),
    403: ("the token must not write there", _WRITE),
    404: ("no such repository, or the token must not see it", _WRITE),
    409: ("somebody else has changed the repository", "repeat the command"),
}
"""The reason and the hint for the HTTP statuses with which the Hub refuses a request."""
