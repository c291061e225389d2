"""List the clients, one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from clients import transformers4
from clients.row import Row

CLIENTS: Mapping[str, Callable[[], Iterator[Row]]] = {
    transformers4.NAME: transformers4.rows,
}
"""A function for each client that compares grown models with their bases there."""
