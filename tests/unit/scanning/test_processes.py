"""Processes that die again and again end a scan."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.scanning.batches import batches
from mergekit_interleave.scanning.distribution import LOSSES, Shard
from mergekit_interleave.scanning.processes import Processes
from mergekit_interleave.scanning.sequences import ScoredTokens


class _Dying:
    """A job that ends each process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_workers_that_always_die() -> None:
    """They are an error, and not a scan that never ends; the hint is to use fewer."""
    (batch,) = batches([ScoredTokens((1, 2, 3), 1, "text")], 64)
    shards = [Shard((0,), (), batch), Shard((1,), ("repeat: 1:2",), batch)]
    with Processes(2).started(_Dying()) as score:
        with pytest.raises(RefusedError, match=f"{LOSSES} times") as caught:
            list(score(shards))
        assert not multiprocessing.active_children()
    assert "--workers" in str(caught.value.hint)
