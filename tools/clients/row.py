"""One comparison of a grown model with its base in a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of docs/clients.md.

    Attributes:
        client: The name of the client.
        version: Its version.
        ran: What was run.
        compared: What was compared.
        found: What was found.
        wrong: Whether this contradicts what this project says.
    """

    client: str
    version: str
    ran: str
    compared: str
    found: str
    wrong: bool = False

    def __str__(self) -> str:
        """Return the row of the table."""
        cells = [self.client, self.version, self.ran, self.compared, self.found]
        text = " | ".join(" ".join(cell.split()).replace("|", "/") for cell in cells)
        return f"| {text} |"
