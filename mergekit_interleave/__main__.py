"""`python -m mergekit_interleave` is `mk-interleave`."""

from mergekit_interleave.cli import main

if __name__ == "__main__":
    main()
