"""Keep only the layer at work in memory: give the pages of mapped weights back after each use.

transformers maps the weights of a checkpoint that is loaded in its own dtype. The kernel reads a
page of them when it is used. A page that is given back is read again from the file.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_SUFFIX = ".safetensors"


class Range(NamedTuple):
    """A range of addresses to which a file of weights is mapped, unchanged."""

    start: int
    stop: int


@dataclass(frozen=True)
class Mappings:
    """The ranges of addresses to which files of weights are mapped in this process.

    Attributes:
        ranges: The ranges, in order.
    """

    ranges: Sequence[Range]

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor lies in a file."""
        return self._around(tensor.data_ptr(), tensor.nbytes) is not None

    def give_back(self, tensor: Any) -> None:
        """Give the whole pages of a tensor back, if it lies in a file; its values stay.

        Memory that lies in no file would lose its values, so it is left alone.
        """
        page = mmap.PAGESIZE
        if self._around(tensor.data_ptr(), tensor.nbytes) is None:
            return
        start = -(-tensor.data_ptr() // page) * page
        stop = (tensor.data_ptr() + tensor.nbytes) // page * page
        if stop > start:
            _advise(start, stop - start)

    def _around(self, address: int, nbytes: int) -> Range | None:
        index = bisect_right(self.ranges, (address, sys.maxsize)) - 1
        if index < 0:
            return None
        found = self.ranges[index]
        return found if address + nbytes <= found.stop else None

    @contextmanager
    def at_work(self, layer: Any) -> Iterator[None]:
        """Give the pages of a layer back at the end of the block."""
        try:
            yield
        finally:
            self._give_back_layer(layer)

    def hook(self, layers: Sequence[Any]) -> None:
        """Give the pages of each layer back after each of its forward passes."""
        for layer in layers:
            layer.register_forward_hook(self._give_back_layer)

    def _give_back_layer(self, layer: Any, *_: Any) -> None:
        for tensor in (*layer.parameters(), *layer.buffers()):
            self.give_back(tensor)


def mappings() -> Mappings:
    """Return where files of weights are mapped; nowhere if the system does not say."""
    file = Path("/proc/self/maps")
    if not file.is_file():
        return Mappings(())
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        place, how, *_, name = [*line.split(None, 5), ""][:6]
        if name.endswith(_SUFFIX) and how.endswith("p"):
            start, stop = (int(each, 16) for each in place.split("-"))
            found.append(Range(start, stop))
    return Mappings(_joined(sorted(found)))


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Join ranges that follow one another."""
    found: list[Range] = []
    for each in ranges:
        if found and found[-1].stop == each.start:
            found[-1] = Range(found[-1].start, each.stop)
        else:
            found.append(each)
    return found


def _advise(address: int, nbytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)
