"""Describe each file in a model's directory by one row of a table.

To add a file to OUT, add its row here; staging, copying and checking read this table. Files that
match no row, such as license notes or the model's own code, are copied from the base.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import NamedTuple

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "interleave.json"
RECIPE = "mergekit_config.yml"
CARD = "README.md"
PICTURE = "layers.svg"


class OutFile(NamedTuple):
    """A file, or a group of files whose names match a pattern.

    Attributes:
        pattern: A pattern for its path in the directory or, if the pattern starts with a star or is
            in `_ANYWHERE`, for its name in any folder.
        writer: What writes it: `run`, an `engine`, the `base` (it is copied from there) or
            `others`.
        usual: Whether a model that mergekit wrote may contain it and still be replaced by
            `run --force`. If there is an interleave.json, it lists the files that may be replaced.
        weights: Whether it may contain weights.
        tokenizer: Whether it belongs to the tokenizer, which mergekit may write instead.
        states_path: Whether it may contain the path from which a tool loaded it.
        replaceable: Whether users may remove or rewrite it; `verify` does not require it.
    """

    pattern: str
    writer: str
    usual: bool = False
    weights: bool = False
    tokenizer: bool = False
    states_path: bool = False
    replaceable: bool = False

    def matches(self, path: str) -> bool:
        """Return whether the row describes a file.

        Args:
            path: The file's path in the directory, with forward slashes.
        """
        name = path.rsplit("/", 1)[-1]
        anywhere = self.pattern.startswith("*") or self.pattern in _ANYWHERE
        return fnmatch.fnmatchcase(name if anywhere else path, self.pattern)


_ANYWHERE = ("consolidated.*",)
"""The patterns that match names in any folder although they do not start with a star."""

FILES = (
    OutFile(CONFIG, "run", usual=True),
    OutFile(MANIFEST, "run"),
    OutFile(RECIPE, "run", usual=True),
    OutFile(CARD, "run", usual=True, replaceable=True),
    OutFile(PICTURE, "run", replaceable=True),
    OutFile(INDEX, "engine", usual=True),
    OutFile("model*.safetensors", "engine", usual=True, weights=True),
    OutFile("*.safetensors", "engine", weights=True),
    OutFile("*.safetensors.index.json", "engine"),
    OutFile("tokenizer.json", "base", usual=True, tokenizer=True),
    OutFile("tokenizer.model", "base", usual=True, tokenizer=True),
    OutFile("tokenizer_config.json", "base", usual=True, tokenizer=True, states_path=True),
    OutFile("special_tokens_map.json", "base", usual=True, tokenizer=True, states_path=True),
    OutFile("added_tokens.json", "base", usual=True, tokenizer=True),
    OutFile("vocab.json", "base", usual=True, tokenizer=True),
    OutFile("merges.txt", "base", usual=True, tokenizer=True),
    OutFile("chat_template.jinja", "base", usual=True, tokenizer=True),
    OutFile("chat_template.json", "base", usual=True, tokenizer=True),
    OutFile("generation_config.json", "base", usual=True, states_path=True),
    OutFile("LICENSE", "base", usual=True),
    OutFile(".gitattributes", "base", usual=True),
    # Not copied from a base: its weights in other formats, and files that tools left there.
    OutFile("*.bin", "others", weights=True),
    OutFile("*.pth", "others", weights=True),
    OutFile("*.pt", "others", weights=True),
    OutFile("*.gguf", "others", weights=True),
    OutFile("*.h5", "others", weights=True),
    OutFile("*.msgpack", "others", weights=True),
    OutFile("consolidated.*", "others", weights=True),
    OutFile("onnx/*", "others", weights=True),
    OutFile("original/*", "others", weights=True),
    OutFile("*.bin.index.json", "others"),
    OutFile("params.json", "others"),
    OutFile("trainer_state.json", "others"),
    OutFile("interleave.yml", "others"),
    OutFile(".eval_results/*", "others", replaceable=True),
    OutFile(".git", "others"),
    OutFile(".git/*", "others"),
    OutFile(".cache/*", "others"),
)


def patterns(wanted: Callable[[OutFile], bool]) -> tuple[str, ...]:
    """Return the patterns of the rows that satisfy a predicate."""
    return tuple(row.pattern for row in FILES if wanted(row))


def is_copied(path: str) -> bool:
    """Return whether a file of the base is copied to OUT: no row for it names another writer."""
    return all(row.writer == "base" for row in FILES if row.matches(path))


def is_usual(path: str) -> bool:
    """Return whether a model that mergekit wrote may contain a file and still be replaced."""
    return "/" not in path and any(row.usual and row.matches(path) for row in FILES)


def is_weights(path: str) -> bool:
    """Return whether a file may contain weights."""
    return any(row.weights and row.matches(path) for row in FILES)


def is_replaceable(path: str) -> bool:
    """Return whether users may remove or rewrite a file that a run has written."""
    return any(row.replaceable and row.matches(path) for row in FILES)


def states_path(path: str) -> bool:
    """Return whether a file may contain the path from which a tool loaded it."""
    return any(row.states_path and row.matches(path) for row in FILES)
