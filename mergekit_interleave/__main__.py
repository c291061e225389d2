"""`python -m mergekit_interleave` is `mk-interleave`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is quiet even while it is still being imported."""
    try:
        from mergekit_interleave import cli  # noqa: PLC0415 - see above
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
