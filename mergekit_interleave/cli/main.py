"""Run the command line, and turn each error into one `error:` line and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import typer

from mergekit_interleave import _requirements
from mergekit_interleave.cli import app as apps
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli._typer_internals import take_named_shell
from mergekit_interleave.errors import InterleaveError

_INTERRUPTED = 130
_BROKEN_PIPE = 141

_LONGEST = 1000
"""The maximum length of an error line in characters; an error may quote a whole file."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 success, 1 refused or unusable, 2 wrong usage, 130 interrupted.
    """
    words = sys.argv[1:] if args is None else args
    take_named_shell(words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        command = words[0] if words and words[0] in apps.COMMANDS else None
        status = apps.application(command)(words, prog_name=_program(), standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if status == _INTERRUPTED:  # typer's exit code for Ctrl-C
            _fail("interrupted", None, _INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)
    except KeyboardInterrupt:
        _fail("interrupted", None, _INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # otherwise Python reports the error again at shutdown
        sys.exit(_BROKEN_PIPE)
    except Exception as error:
        if debug and not isinstance(error, typer.TyperException):
            raise
        if isinstance(error, InterleaveError):
            text.tell("warning", error.warnings)
        _fail(*_explain(error, words))


def _program() -> str:
    """Return the name that the program was started by; completion is installed for this name."""
    name = Path(sys.argv[0]).stem if sys.argv else apps.NAME
    return name if name == apps.ALIAS else apps.NAME


def _explain(error: Exception, words: list[str]) -> tuple[str, str | None, int]:
    """Return the message, the hint and the exit code of an error."""
    match error:
        case InterleaveError():
            return str(error), error.hint, error.exit_code
        case typer.TyperException():
            return error.format_message(), _usage_hint(error, words), error.exit_code
        case OSError():
            place = error.filename or "standard output"
            return f"{place}: {error.strerror or error}", None, 1
    if found := _requirements.unmet():
        remedy = _requirements.error_of(found)
        if isinstance(error, ImportError):
            return str(remedy), remedy.hint, remedy.exit_code
        return f"unexpected {type(error).__name__}: {error}; {remedy}", remedy.hint, 1
    hint = "`mk-interleave --debug ...` shows the traceback; please report it"
    return f"unexpected {type(error).__name__}: {error}", hint, 1


def _usage_hint(error: typer.TyperException, words: list[str]) -> str:
    command = next((word for word in words if word in apps.COMMANDS), None)
    if command in options.WITH_DIRECTIVE and "extra argument" in error.format_message():
        return options.QUOTES
    return f"mk-interleave {command} --help" if command else "mk-interleave --help"


def _fail(message: str, hint: str | None, status: int) -> NoReturn:
    """Print one `error:` line and at most one `hint:` line."""
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    text.tell("error", [line])
    text.tell("hint", [" ".join(hint.split()) if hint else None])
    sys.exit(status)
