"""`python -m mergekit_interleave` is `mk-interleave`."""

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C is quiet even while it is still being imported."""
    try:
        from mergekit_interleave.cli import main as cli  # noqa: PLC0415 - see above

        cli.main()
    except KeyboardInterrupt:
        _leave()
    except SystemExit as left:
        if left.code == INTERRUPTED:
            _leave()
        raise


def _leave() -> None:
    """Exit with 130.

    Where Ctrl-C came while `exec` ran a string, as dataclasses do, CPython 3.11 under `-m` ends
    by the signal instead, though the interrupt was handled and `sys.exit` was called.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
