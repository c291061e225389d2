"""Run `mk-interleave` as `python -m mergekit_interleave`."""

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line. Ctrl-C prints no traceback, even while modules are being imported."""
    try:
        from mergekit_interleave.cli import main as cli  # noqa: PLC0415 - Ctrl-C may interrupt it

        cli.main()
    except KeyboardInterrupt:
        _leave()
    except ImportError as error:
        _name_the_missing(error)
    except SystemExit as error:
        if error.code == INTERRUPTED:
            _leave()
        raise


def _name_the_missing(error: ImportError) -> None:
    """Print which packages the command line needs, and exit.

    The command line reports every later error itself.
    """
    from mergekit_interleave import _requirements  # noqa: PLC0415

    found = _requirements.unmet()
    if not found:
        raise error
    remedy = _requirements.error_of(found)
    print(f"error: {remedy}\nhint: {remedy.hint}", file=sys.stderr)  # noqa: T201
    sys.exit(remedy.exit_code)


def _leave() -> None:
    """Exit with status 130.

    `sys.exit` is not enough. The dataclasses module calls `exec` on a string. If Ctrl-C interrupts
    such a call, the signal terminates CPython 3.11 under `-m` even if the interrupt was handled.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
