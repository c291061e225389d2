"""One type for each rule of the data file, through the real pipeline; `make zoo` runs them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zoo

from mergekit_interleave import architecture

EXACT = [
    ("qwen2", "a list that is in the file"),
    ("gpt2", "another key for the depth, other names to zero, biases"),
    ("bloom", "names that are no part of others"),
    ("gemma2", "windows whose parity would shift"),
    ("qwen3_moe", "dense layers placed by a step"),
    ("deepseek_v2", "dense layers first"),
    ("bamba", "attention placed by indices"),
    ("recurrent_gemma", "a pattern that is repeated"),
    ("minicpm3", "a scale over the root of the depth"),
    ("gpt_oss", "fused experts, tensors that mergekit does not know"),
    ("mbart", "a decoder alone, whose cache is sized by the encoder's depth"),
]


@pytest.mark.parametrize(("model_type", "rule"), EXACT, ids=[name for name, _ in EXACT])
def test_expansions_are_exact(model_type: str, rule: str, tmp_path: Path) -> None:
    """Logits and greedy text are the base's, on every 2nd layer and on several copies in a row."""
    zoo.quiet()
    zoo.build(model_type).save_pretrained(tmp_path / "base")
    for i, plan in enumerate(zoo.PLANS):
        outcome = zoo.expand(tmp_path / "base", plan, tmp_path / f"out{i}")
        assert outcome.result == "exact", (rule, plan, outcome)


def test_the_libraries_keep_their_words_to_themselves(tmp_path: Path) -> None:
    """They say a lot of a model that mergekit has no definition of."""
    zoo.quiet()
    zoo.build("gpt_oss").save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "mergekit_interleave", "run", "append: 1", "out"]
    result = subprocess.run(
        [*command, "--model", "base"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("note: ") for line in result.stderr.splitlines()), result.stderr


REFUSED = [
    ("bert", "interleave: every 2", "end in a norm of the sum"),
    ("jamba", "interleave: every 2", "by a period"),
    ("diffllama", "interleave: every 2", "compute with their own index"),
    ("gpt_neox_japanese", "append: 1", "the new layer 7 would be built unlike layer 7"),
    ("modernbert-decoder", "interleave: every 1", "built unlike layer 0"),
]


@pytest.mark.parametrize(
    ("model_type", "plan", "reason"), REFUSED, ids=[name for name, *_ in REFUSED]
)
def test_what_cannot_be_exact_is_refused(
    model_type: str, plan: str, reason: str, tmp_path: Path
) -> None:
    """With a reason that is true of it, and nothing at OUT."""
    zoo.quiet()
    zoo.build(model_type).save_pretrained(tmp_path / "base")
    outcome = zoo.expand(tmp_path / "base", plan, tmp_path / "out")
    assert outcome.result == "refused", outcome
    assert reason in outcome.detail
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_every_reason_is_used_and_known() -> None:
    """The data file and its reasons agree."""
    reasons = architecture._facts()["reasons"]  # noqa: SLF001 - the data is the subject
    used = set()
    for name in architecture.known_types():
        family = architecture.family_of(name)
        assert family is not None
        used |= {family.refused, *family.unless.values(), *(why for _, why in family.when.values())}
    assert used - {None} == set(reasons)
