"""Freed memory is kept during a scan, and given back after it."""

from __future__ import annotations

import platform
import resource
import sys

import numpy as np
import pytest

from mergekit_interleave.scanning import allocator

BLOCK = 2**26

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc alone"
)


def new_pages() -> int:
    """Return how many pages the system gives for a large block that is used and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(BLOCK, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_kept_and_given_back() -> None:
    """A block of the same size as a freed one takes no new pages, until the end of the context."""
    with allocator.restored():
        usual = new_pages()
        allocator.keep_freed()
        new_pages()
        assert new_pages() < usual / 10
    assert new_pages() > usual / 2


def test_nothing_to_restore() -> None:
    """If nothing was kept, nothing changes."""
    before = new_pages()
    with allocator.restored():
        pass
    assert new_pages() > before / 2
