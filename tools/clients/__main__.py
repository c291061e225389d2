"""Run grown models in every client, and write the table. Usage: PAGE [CLIENT]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from clients.environment import ClientError
from clients.registry import CLIENTS
from clients.row import Row


def main() -> int:
    """Check one client or all; return 1 if one contradicts what this project says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="the file for the table")
    parser.add_argument("client", nargs="?", help="check only this client, and write nothing")
    arguments = parser.parse_args()
    chosen = [arguments.client] if arguments.client else [*CLIENTS]
    if not {*chosen} <= CLIENTS.keys():
        print(f"no client {arguments.client!r}; there are: {', '.join(CLIENTS)}")
        return 1
    rows = []
    for row in (row for name in chosen for row in _rows(name)):
        print(f"{'WRONG ' if row.wrong else ''}{row}", flush=True)
        rows.append(row)
    if not arguments.client:
        text = _PAGE.format(rows="\n".join(map(str, rows)))
        arguments.page.write_text(text, encoding="utf-8")
    return 1 if any(row.wrong for row in rows) else 0


def _rows(name: str) -> Iterator[Row]:
    """Yield the rows of a client; what cannot be installed is a row, too."""
    try:
        yield from CLIENTS[name]()
    except ClientError as error:
        missing = str(error).startswith("not installed")
        yield Row(name, "-", "-", "-", str(error), wrong=not missing)


_PAGE = """# Clients

This page shows what grown models do in programs that this project did not write. `make clients`
makes an environment for each of them in `.cache/clients`, grows toy models and SmolLM2, runs the
results and their bases there, compares, and writes this table. It fails if a client contradicts
what this project says. What could not be installed has a row, too.

| client | version | run | compared | found |
| --- | --- | --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
