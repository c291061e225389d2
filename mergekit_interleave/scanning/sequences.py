"""stub"""
from dataclasses import dataclass
@dataclass(frozen=True)
class ScoredTokens:
    tokens: tuple[int, ...]
    start: int
    kind: str
