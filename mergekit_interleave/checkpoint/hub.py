"""Fetch files from the Hugging Face Hub.

huggingface_hub does all transfers; its cache, token and offline settings apply.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from mergekit_interleave.directive.model_ref import ModelPath
from mergekit_interleave.errors import CheckpointError, UnreachableError


def fetch_config(
    model: ModelPath,
    *,
    name: str = "config.json",
    cached_only: bool,
    cache_dir: str | None = None,
) -> Path:
    """Fetch config.json alone.

    Args:
        model: A Hub id, with an optional revision.
        name: The name of the file, if it is not config.json.
        cached_only: Do not access the network.
        cache_dir: A cache to use instead of the default one.

    Returns:
        The snapshot directory in the cache that contains the file.

    Raises:
        CheckpointError: The file cannot be fetched.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - a directory needs no Hub

    def fetch() -> str:
        return str(
            hf_hub_download(
                model.path,
                name,
                revision=model.revision,
                cache_dir=cache_dir,
                local_files_only=cached_only or not _has_address(),
            )
        )

    return Path(_ask(fetch, model, name)).parent


def fetch_files(
    model: ModelPath,
    *,
    wanted: Sequence[str] | None = None,
    unwanted: Sequence[str] | None = None,
    cached_only: bool = False,
    cache_dir: str | None = None,
) -> None:
    """Fetch the files of a repository that match one of `wanted` and none of `unwanted`.

    Args:
        model: A Hub id, with an optional revision.
        wanted: Glob patterns; None matches every file.
        unwanted: Glob patterns; None matches no file.
        cached_only: Do not access the network.
        cache_dir: A cache to use instead of the default one.

    Raises:
        CheckpointError: The files cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    def fetch() -> str:
        return str(
            snapshot_download(
                model.path,
                revision=model.revision,
                cache_dir=cache_dir,
                allow_patterns=None if wanted is None else list(wanted),
                ignore_patterns=None if unwanted is None else list(unwanted),
                local_files_only=cached_only or not _has_address(),
            )
        )

    _ask(fetch, model)


@cache
def _has_address() -> bool:
    """Whether the Hub's host name can be resolved; if not, the client retries for 30 seconds."""
    from urllib.request import getproxies  # noqa: PLC0415 - as slow to import as the client

    from huggingface_hub import constants  # noqa: PLC0415

    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or getproxies():  # a proxy resolves the name itself
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def is_hub_id(text: str) -> bool:
    """Whether a text is a valid name of a Hub repository: `org/name`, or a bare `name`."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _ask(fetch: Callable[[], str], model: ModelPath, name: str = "config.json") -> str:
    """Return the path of a download, or raise an error that states the reason."""
    from huggingface_hub import constants, errors  # noqa: PLC0415
    from huggingface_hub.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()  # hides retries; a failure is reported below

    # The first match applies: the error of a gated repository is a subclass of "not found".
    reasons: tuple[tuple[type[Exception], str, str], ...] = (
        (
            errors.GatedRepoError,
            "the repository is gated",
            "request access on its Hub page, then set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or it is private",
            "check the id; for a private repository set HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError,
            "no such revision",
            "write org/name@revision with a branch, tag or commit",
        ),
        (
            errors.LocalEntryNotFoundError,
            "no such directory, not in the Hub's cache, and the Hub was not reached",
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE",
        ),
        (
            errors.EntryNotFoundError,
            f"the repository has no {name}",
            "name a repository with a transformers model; for a PEFT adapter, org/base+org/adapter",
        ),
    )
    try:
        with progress_bars():
            return fetch()
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        for kind, reason, hint in reasons:
            if isinstance(error, kind):
                if kind is errors.LocalEntryNotFoundError and constants.HF_HUB_OFFLINE:
                    hint = "unset HF_HUB_OFFLINE, which prevents downloads"  # noqa: PLW2901
                missed = kind is errors.LocalEntryNotFoundError
                raised = UnreachableError if missed else CheckpointError
                raise raised(f"{model}: {reason}", hint=hint) from error
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{model}: download failed: {detail[:300]}") from error


SHOW_BARS: ContextVar[bool] = ContextVar("SHOW_BARS", default=False)
"""Whether downloads show progress bars; set by callers that show progress."""


@contextmanager
def progress_bars() -> Iterator[None]:
    """Hide the progress bars of huggingface_hub, unless `SHOW_BARS` is set."""
    from huggingface_hub import utils  # noqa: PLC0415

    if SHOW_BARS.get() or utils.are_progress_bars_disabled():
        yield
        return
    # huggingface_hub warns if an environment variable overrides this.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.enable_progress_bars()
