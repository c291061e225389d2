"""A text and a file of items become the sequences that lm-eval would score."""

from __future__ import annotations

import json
import os
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import lm_eval_tokens
import pytest
from harness import tokenizer

from mergekit_interleave._files import read_text
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.scanning import sequences
from mergekit_interleave.scanning.sequences import ScoredTokens

GOOD = {"prompt": "word1 word2", "answer": " word3"}


@pytest.fixture(scope="module")
def plain() -> Any:
    """Return a tokenizer of words that adds no special tokens."""
    return tokenizer(64)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Return the tokenizers of the record; SmolLM2's only where its checkpoint is."""
    return lm_eval_tokens.tokenizers(os.environ.get("MK_INTERLEAVE_SMOLLM2"))


@pytest.fixture
def smollm2(tokenizers: dict[str, Any]) -> Any:
    """Return the tokenizer of SmolLM2."""
    return made(tokenizers, "smollm2")


def made(tokenizers: dict[str, Any], name: str) -> Any:
    """Return a tokenizer of the record, or skip the test."""
    if name not in tokenizers:
        pytest.skip("MK_INTERLEAVE_SMOLLM2 names no checkpoint; `make test` builds one")
    return tokenizers[name]


def write(path: Path, *items: object) -> Path:
    """Write items, or lines as they are."""
    file = path / "items.jsonl"
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def of_file(tokenizer: Any, file: Path, most_positions: int | None = None) -> list[ScoredTokens]:
    """Return the sequences of a file of items."""
    return sequences.of_items(tokenizer, read_text(file), str(file), most_positions)


def divided(tokenizer: Any, pairs: list[tuple[str, str]], path: Path) -> list[list[list[int]]]:
    """Return the tokens before the scored ones and the scored ones of each item."""
    file = write(path, *({"prompt": prompt, "answer": answer} for prompt, answer in pairs))
    found = of_file(tokenizer, file)
    assert {one.kind for one in found} == {"item"}
    assert [one.scored for one in found] == [len(one.tokens[one.start :]) for one in found]
    return [[[*one.tokens[: one.start]], [*one.tokens[one.start :]]] for one in found]


@pytest.mark.parametrize("name", lm_eval_tokens.PAIRS)
def test_items_have_the_tokens_of_lm_eval(
    name: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    """Each pair of prompt and answer has the recorded tokens of lm-eval 0.4.13."""
    record = json.loads(lm_eval_tokens.RECORD.read_text(encoding="utf-8"))
    pairs = lm_eval_tokens.PAIRS[name]
    assert divided(made(tokenizers, name), pairs, tmp_path) == record[name]


@pytest.mark.parametrize("name", lm_eval_tokens.PAIRS)
def test_the_record_is_what_lm_eval_does(name: str, tokenizers: dict[str, Any]) -> None:
    """The installed lm-eval makes the recorded tokens."""
    pytest.importorskip("lm_eval")
    record = json.loads(lm_eval_tokens.RECORD.read_text(encoding="utf-8"))
    pairs = lm_eval_tokens.PAIRS[name]
    assert lm_eval_tokens.by_lm_eval(made(tokenizers, name), pairs) == record[name]


def test_a_prompt_of_spaces_is_an_empty_one(plain: Any, tmp_path: Path) -> None:
    """A prompt with only spaces, at which lm-eval stops, is replaced by the prefix token."""
    assert divided(plain, [(" \n", "word7")], tmp_path) == [[[1], [10]]]


@pytest.mark.parametrize("answer", ["word3", 1])
def test_choices(answer: object, plain: Any, tmp_path: Path) -> None:
    """The answer is one of the choices or its index, and only its tokens are scored."""
    choices = ["word2", "word3"]
    file = write(tmp_path, {"prompt": "word1 ", "choices": choices, "answer": answer, "id": 7})
    assert of_file(plain, file) == [ScoredTokens((4, 6), 1, "item")]


def test_empty_lines_and_a_byte_order_mark(plain: Any, tmp_path: Path) -> None:
    """Empty lines, a byte order mark, CRLF and U+2028 in a text do not change the items."""
    file = tmp_path / "items.jsonl"
    text = '\ufeff{"prompt": "word1\u2028", "answer": "word2"}\r\n\r\n' + json.dumps(GOOD) + "\r\n"
    file.write_bytes(text.encode())
    found = of_file(plain, file)
    assert found == [ScoredTokens((4, 5), 1, "item"), ScoredTokens((4, 5, 6), 2, "item")]


@pytest.mark.parametrize(
    ("item", "named"),
    {
        "not JSON": ("{", "JSON"),
        "too deep": ("[" * 100_000, "JSON"),
        "a list": ([1], "object"),
        "no prompt": ({"answer": "word1"}, "`prompt`"),
        "no answer": ({"prompt": "word1"}, "`answer`"),
        "a number as prompt": ({"prompt": 1, "answer": "word1"}, "`prompt`"),
        "a number as answer": ({"prompt": "word1", "answer": 4}, "`answer`"),
        "half of a pair": ('{"prompt": "\\ud800", "answer": "word1"}', "`prompt`"),
        "choices as text": (GOOD | {"choices": "word3"}, "`choices`"),
        "choices as numbers": (GOOD | {"choices": [1, 2]}, "`choices`"),
        "not a choice": (GOOD | {"choices": ["word3", "word4"]}, "`choices`"),
        "no choices": (GOOD | {"choices": []}, "`choices`"),
        "true": (GOOD | {"choices": ["word3", "word4"], "answer": True}, "`choices`"),
        "an index too large": (GOOD | {"choices": ["a", "b"], "answer": 2}, "2 choices"),
        "an index below 0": (GOOD | {"choices": ["a", "b"], "answer": -1}, "-1"),
        "an empty answer": ({"prompt": "word1 ", "answer": ""}, "`answer`"),
        "no tokens": ({"prompt": "word1 wo", "answer": "rd2"}, "`answer`"),
        "only the prefix": ({"prompt": "", "answer": "<s>"}, "`answer`"),
        "too long": ({"prompt": "word1 " * 8, "answer": "word2"}, "8 positions"),
    }.values(),
)
def test_what_is_not_an_item(item: object, named: str, plain: Any, tmp_path: Path) -> None:
    """The error names the file, the line, and the key or number that is wrong."""
    file = write(tmp_path, GOOD, item)
    with pytest.raises(DirectiveError) as error:
        of_file(plain, file, most_positions=8)
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert named in str(error.value)


def test_the_longest_item(plain: Any, tmp_path: Path) -> None:
    """An item may have as many tokens as the model has positions."""
    file = write(tmp_path, {"prompt": "word1 " * 7, "answer": "word2"})
    (found,) = of_file(plain, file, most_positions=8)
    assert (len(found.tokens), found.start) == (8, 7)


def test_a_tokenizer_without_a_prefix(tmp_path: Path) -> None:
    """Without BOS and EOS, an item needs a prompt, and the others are encoded."""
    made = tokenizer(64)
    made.bos_token = made.eos_token = None
    assert divided(made, [("word1 ", "word2")], tmp_path) == [[[4], [5]]]
    with pytest.raises(DirectiveError, match=r"line 1: .*`prompt`.*BOS"):
        divided(made, [("", "word2")], tmp_path)


def test_a_merge_that_leaves_no_token(smollm2: Any, tmp_path: Path) -> None:
    """An answer that is merged into the last token of the prompt has no score of its own."""
    with pytest.raises(DirectiveError, match=r"line 1: .*`answer`"):
        divided(smollm2, [("The capital of Fr", "ance")], tmp_path)


@pytest.mark.parametrize(
    ("content", "named"), [(b"", ""), (b"\n\n", ""), (b'{"a": 1}\n\xff', ", line 2"), (None, "")]
)
def test_files_that_hold_no_items(
    content: bytes | None, named: str, plain: Any, tmp_path: Path
) -> None:
    """A file that is missing, empty or not UTF-8 is an error that names it."""
    file = tmp_path / "items.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DirectiveError) as error:
        of_file(plain, file)
    assert str(error.value).startswith(f"{file}{named}: ")


@pytest.mark.parametrize("name", ["plain", "with BOS"])
@pytest.mark.parametrize("most", [1, 2, 6, 7, 8, 1000])
@pytest.mark.parametrize("length", [2, 4, 128])
def test_windows(name: str, most: int, length: int, tokenizers: dict[str, Any]) -> None:
    """Every token but the first is scored once, behind the token before it, up to the bound."""
    tokens = tokenizers[name].encode(" ".join(f"word{i}" for i in range(20)))
    text = tokenizers[name].decode(tokens[-20:])
    found = sequences.of_text(tokenizers[name], text, "words", most_tokens=most, length=length)
    wanted = tokens[: most + 1]
    assert [*chain(*(one.tokens[one.start :] for one in found))] == wanted[1:]
    assert sum(one.scored for one in found) == min(most, len(tokens) - 1)
    assert {(one.start, one.kind) for one in found} == {(1, "text")}
    assert all(len(one.tokens) == length for one in found[:-1])
    assert 2 <= len(found[-1].tokens) <= length
    for one, following in pairwise(found):
        assert following.tokens[0] == one.tokens[-1]


@pytest.mark.parametrize("text", ["", "word1"])
def test_a_text_that_is_too_short(text: str, plain: Any) -> None:
    """A text of fewer than two tokens is an error that names it."""
    with pytest.raises(DirectiveError, match=r"^book\.txt: "):
        sequences.of_text(plain, text, "book.txt", most_tokens=100)


def test_the_default_text(smollm2: Any) -> None:
    """The default text has 4,000 to 8,000 tokens in plain paragraphs."""
    text, name = sequences.default_text()
    found = sequences.of_text(smollm2, text, name, most_tokens=100_000)
    assert 4000 < sum(one.scored for one in found) < 8000
    assert len(text.split("\n\n")) > 40
    assert "_" not in text
    assert "  " not in text


def test_the_name_of_the_default_text(plain: Any) -> None:
    """The default text is in the package, and has a name for messages."""
    text, name = sequences.default_text()
    assert sequences.DEFAULT_TEXT.parent == Path(sequences.__file__).parent
    assert sequences.of_text(plain, text, name, most_tokens=100)
    assert name
