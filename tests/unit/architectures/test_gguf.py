"""What is known of llama.cpp's architectures: complete, and right by gguf-py's tensors."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from typing import Any

import gguf
import pytest
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, LlamaFileType

from mergekit_interleave.architectures import gguf as architectures
from mergekit_interleave.architectures.gguf import Period

WRITERS = {
    "attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_down_chexps", "ssm_out",
    "time_mix_output", "channel_mix_value", "shortconv.out_proj", "vis_attn_output", "vis_down",
    "proj", "ffn_latent_up",
}  # fmt: skip
"""The tensors of a layer whose output is added to the residual stream, in any architecture."""

DATA: dict[str, Any] = json.loads(architectures.DATA.read_text(encoding="utf-8"))


def tensors_of(name: str) -> set[str]:
    """Return the tensors of a layer that gguf-py knows for an architecture."""
    (key,) = [key for key, value in MODEL_ARCH_NAMES.items() if value == name]
    names = (TENSOR_NAMES[kind] for kind in MODEL_TENSORS.get(key, []))
    return {n.removeprefix("blk.{bid}.") for n in names if n.startswith("blk.{bid}.")}


def test_every_architecture_of_gguf_py_is_known() -> None:
    """Each architecture that gguf-py names has an entry; only projectors have none."""
    known = {*architectures.known_architectures()}
    assert {MODEL_ARCH_NAMES[key] for key in MODEL_ARCH} <= known


GROWN = [
    name
    for name in architectures.known_architectures()
    if name in MODEL_ARCH_NAMES.values()
    and (found := architectures.architecture_of(name)) is not None
    and found.refused is None
]


@pytest.mark.parametrize("name", GROWN)
def test_residual_writers(name: str) -> None:
    """The substrings match the tensors that write to the residual stream, and no others."""
    found = architectures.architecture_of(name)
    assert found is not None
    extra = {"layer_output_scale"} if name == "talkie" else set()
    matched = {
        tensor
        for tensor in tensors_of(name)
        if any(part in f"blk.0.{tensor}.weight" for part in found.residual_writers)
    }
    assert matched <= WRITERS | extra
    missing = (tensors_of(name) & WRITERS) - matched
    assert missing <= NEVER_LOADED.get(name, set())


NEVER_LOADED = {"smallthinker": {"ffn_down"}}
"""Writers that gguf-py lists for an architecture, and that llama.cpp does not load."""


@pytest.mark.parametrize("name", GROWN)
def test_output_norms(name: str) -> None:
    """The norms between writers and stream are tensors of the architecture."""
    found = architectures.architecture_of(name)
    assert found is not None
    if found.output_norms is not None:
        for part in found.output_norms.all_names:
            assert any(part in f"blk.0.{t}.weight" for t in tensors_of(name)), part


def test_the_file_has_known_keys() -> None:
    """Sections and entries have the keys that the docstrings document, and no others."""
    assert DATA.keys() == typing.get_type_hints(architectures.GgufData).keys()
    keys = architectures.entry_keys()
    periods = {item.name for item in dataclasses.fields(Period)}
    used = set()
    for name, entry in DATA["architectures"].items():
        assert entry.keys() <= keys, name
        for period in entry.get("periods", ()):
            assert period.keys() <= periods, name
            assert "length" in period or "key" in period, name
        used |= {entry["refused"]} if "refused" in entry else set()
        used |= {*entry.get("refused_if", {}).values()}
    assert used == DATA["reasons"].keys()
    assert list(DATA["architectures"]) == sorted(DATA["architectures"])


def test_names_of_quantizations() -> None:
    """The numbers of quantizations are those of gguf-py."""
    names = {
        str(int(kind)): re.sub("^(MOSTLY|ALL)_", "", kind.name)
        for kind in LlamaFileType
        if kind is not LlamaFileType.GUESSED
    }
    assert DATA["file_types"] == names
    assert architectures.file_type(15) == "Q4_K_M"
    assert architectures.file_type(99) is None


def test_arrays_are_keys_of_gguf_py() -> None:
    """Keys with one entry per layer are keys that gguf-py or llama.cpp writes."""
    known = {
        value.replace("{arch}.", "")
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    newer = {"attention.rope_pattern", "attention.compress_ratios", "attention.recurrent_layers"}
    assert architectures.per_layer_arrays() - newer <= known
    assert not architectures.per_layer_arrays() & architectures.other_arrays()


@pytest.mark.parametrize(
    ("first", "others"), [(False, [2, 5, 8]), (True, [0, 3, 6])], ids=["last", "first"]
)
def test_a_period(first: bool, others: list[int]) -> None:
    """The layer of the other kind is the last or the first one of each period."""
    period = Period(3, first=first)
    assert [index for index in range(9) if period.is_other(index)] == others
    assert period.of_length(4).length == 4


def test_classes_of_depths() -> None:
    """Depths with which llama.cpp computes something else are told apart."""
    gemma2 = architectures.architecture_of("gemma2")
    command_r = architectures.architecture_of("command-r")
    minicpm3 = architectures.architecture_of("minicpm3")
    assert gemma2
    assert command_r
    assert minicpm3
    assert gemma2.depth_class(26) == gemma2.depth_class(28) != gemma2.depth_class(46)
    assert command_r.depth_class(40) == command_r.depth_class(50) != command_r.depth_class(64)
    assert command_r.depth_class(64) == command_r.depth_class(80)
    assert minicpm3.depth_class(60) != minicpm3.depth_class(61)
