"""The data files: every key is known, has the right type and is documented."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import architecture_data
import pytest

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import task as tasks
from mergekit_interleave.planning import per_layer_config

DATA = json.loads(families.DATA.read_text(encoding="utf-8"))
TASKS = json.loads(tasks.DATA.read_text(encoding="utf-8"))


def test_the_data_is_valid() -> None:
    """Every entry has known keys, right types and references to what exists."""
    assert architecture_data.problems(DATA) == []
    assert architecture_data.task_problems(TASKS) == []


@pytest.mark.parametrize("name", families.known_types())
def test_every_family_loads(name: str) -> None:
    """The typed form holds what the file says."""
    family = families.family_of(name)
    assert family is not None
    for key, value in DATA["families"][name].items():
        holder = family.facts if hasattr(family.facts, key) else family
        assert json.loads(json.dumps(_plain(getattr(holder, key)))) == _whole(key, value)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _whole(key: str, value: Any) -> Any:
    """An entry's value, with the defaults of the keys that it leaves out."""
    defaults: dict[str, dict[str, Any]] = {
        "output_norms": {"optional_names": [], "closed_value": 0, "types_key": None, "types": []},
        "kv_sharing": {"double_wide_key": None, "double_wide_tensors": {}},
    }
    return {**defaults[key], **value} if key in defaults else value


FAULTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "families.llama: unknown key 'residual_writer'": (
        ("families", "llama", "residual_writer"),
        ["o_proj"],
    ),
    "families.llama.residual_writers: 'o_proj' is not a list": (
        ("families", "llama", "residual_writers"),
        "o_proj",
    ),
    "families.llama.depth[0]: 3 is not str": (("families", "llama", "depth"), [3]),
    "families.llama.has_mtp_layers: 1 is not bool": (("families", "llama", "has_mtp_layers"), 1),
    "families.llama: there is no reason 'postnorm'": (("families", "llama", "refused"), "postnorm"),
    "families.opt: there is no reason 'x'": (
        ("families", "opt", "refused_unless"),
        {"do_layer_norm_before": [True, "x"]},
    ),
    "families.opt.refused_unless.key: [True] does not hold 2 items": (
        ("families", "opt", "refused_unless"),
        {"key": [True]},
    ),
    "families.gemma2.output_norms: unknown key 'value'": (
        ("families", "gemma2", "output_norms", "value"),
        -1,
    ),
    "families.hy_v4: there is no per-layer list 'types'": (
        ("families", "hy_v4", "indexer_sharing", "types_key"),
        "types",
    ),
    "families.llama.indexer_sharing: full is missing": (
        ("families", "llama", "indexer_sharing"),
        {"types_key": "a", "shared": "b", "absent_tensors": []},
    ),
    "families.llama.mergekit_yaml_result: 'good' is not one of 'exact', 'config', 'tensors'": (
        ("families", "llama", "mergekit_yaml_result"),
        "good",
    ),
    "families.minimax.identity_constants.x: value is missing": (
        ("families", "minimax", "identity_constants"),
        {"x": {}},
    ),
    "families.llama.depth_list: 3 is not str or null": (("families", "llama", "depth_list"), 3),
    "families.llama: [] is not a mapping": (("families", "llama"), []),
    "composites.gemma3: there is no family 'gemma33'": (
        ("composites", "gemma3", "family"),
        "gemma33",
    ),
    "reasons.new: no family uses it": (("reasons", "new"), "it is new"),
    "assumed_family: there is no family 'lama'": (("assumed_family",), "lama"),
    "families: the entries are not sorted by name": (("families", "a_new_type"), {}),
    "architectures.json: unknown key 'family'": (("family",), {}),
    "architectures.json.quantized.awq: unknown key 'zeros'": (("quantized", "awq", "zeros"), "x"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_named_with_its_entry(message: str) -> None:
    """One wrong value gives one message."""
    path, value = FAULTS[message]
    data = copy.deepcopy(DATA)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert architecture_data.problems(data) == [message]


def test_a_missing_section_and_a_wrong_task_are_named() -> None:
    """Both are faults of the file, not of an entry."""
    data = {key: value for key, value in DATA.items() if key != "reasons"}
    assert architecture_data.problems(data) == ["architectures.json: reasons is missing"]
    wrong = {"ForCausalLM": {"tag": "text-generation"}}
    assert architecture_data.task_problems(wrong) == ["tasks.json.ForCausalLM: load is missing"]


@pytest.mark.parametrize(
    "described",
    [
        families.ArchitectureData,
        families.Composite,
        families.ConfigFacts,
        families.Family,
        families.IdentityConstant,
        families.IndexerSharing,
        families.KVSharing,
        families.OutputNorms,
        families.QuantizationRule,
        tasks.TaskEntry,
    ],
)
def test_every_key_is_documented(described: type) -> None:
    """In the docstring of the class that holds it, in any order, and nothing else is."""
    keys = [key for key, _ in architecture_data.documented(described)]
    names = set()
    for base in (*getattr(described, "__orig_bases__", ()), described):
        names |= set(getattr(base, "__annotations__", {}))
    names |= set(getattr(described, "__required_keys__", ()))
    assert sorted(keys) == sorted(names)


def test_the_reference_is_current() -> None:
    """`python tools/architecture_data.py` writes it."""
    assert architecture_data.PAGE.read_text(encoding="utf-8") == architecture_data.page()


def test_the_periodic_rules_are_known() -> None:
    """Each names a rule that can be solved, and one key for each of its numbers."""
    for name in families.known_types():
        family = families.family_of(name)
        assert family is not None
        for rule, *keys in family.facts.periodic_rules:
            numbers = per_layer_config._RULES[rule].__code__.co_argcount - 1  # type: ignore[attr-defined]  # noqa: SLF001
            assert len(keys) == numbers, (name, rule)


def test_only_what_code_sets_is_left_out_of_an_entry() -> None:
    """Every other attribute of a family is a key."""
    names = {item.name for item in dataclasses.fields(families.Family)}
    assert names >= architecture_data.SET_BY_CODE
    assert not architecture_data.SET_BY_CODE & architecture_data.entry_hints().keys()
