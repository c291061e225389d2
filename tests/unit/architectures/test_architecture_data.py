"""The architecture data: every key is known, has the right type and is documented."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import architecture_data
import pytest

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import task as tasks
from mergekit_interleave.architectures import transformers4
from mergekit_interleave.planning import per_layer_config

DATA = json.loads(families.DATA.read_text(encoding="utf-8"))
TASKS = json.loads(tasks.DATA.read_text(encoding="utf-8"))


def test_the_data_is_valid() -> None:
    """Each entry has known keys, values of the right type and references to existing entries."""
    assert architecture_data.problems(DATA) == []
    assert architecture_data.task_problems(TASKS) == []
    old = json.loads(transformers4.DATA.read_text(encoding="utf-8"))
    assert architecture_data.transformers4_problems(old) == []


@pytest.mark.parametrize("name", families.known_types())
def test_every_family_loads(name: str) -> None:
    """The loaded family has the values of the file."""
    family = families.family_of(name)
    assert family is not None
    for key, value in DATA["families"][name].items():
        holder = family.facts if hasattr(family.facts, key) else family
        assert json.loads(json.dumps(_plain(getattr(holder, key)))) == _whole(key, value)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _whole(key: str, value: Any) -> Any:
    """Return an entry's value with the defaults of missing keys."""
    defaults: dict[str, dict[str, Any]] = {
        "output_norms": {"optional_names": [], "closed_value": 0, "types_key": None, "types": []},
        "kv_sharing": {"double_wide_key": None, "double_wide_tensors": {}},
    }
    return {**defaults[key], **value} if key in defaults else value


FAULTS: list[tuple[tuple[str, ...], Any, str, str]] = [
    (("families", "llama", "residual_writer"), ["o_proj"], "families.llama", "'residual_writer'"),
    (
        ("families", "llama", "residual_writers"),
        "o_proj",
        "families.llama.residual_writers",
        "'o_proj'",
    ),
    (("families", "llama", "depth"), [3], "families.llama.depth[0]", "str"),
    (("families", "llama", "has_mtp_layers"), 1, "families.llama.has_mtp_layers", "bool"),
    (("families", "llama", "refused"), "postnorm", "families.llama", "'postnorm'"),
    (
        ("families", "opt", "refused_unless"),
        {"do_layer_norm_before": [True, "x"]},
        "families.opt",
        "reason 'x'",
    ),
    (
        ("families", "opt", "refused_unless"),
        {"key": [True]},
        "families.opt.refused_unless.key",
        "2 items",
    ),
    (
        ("families", "gemma2", "output_norms", "value"),
        -1,
        "families.gemma2.output_norms",
        "key 'value'",
    ),
    (
        ("families", "hy_v4", "indexer_sharing", "types_key"),
        "types",
        "families.hy_v4",
        "list 'types'",
    ),
    (
        ("families", "llama", "indexer_sharing"),
        {"types_key": "a", "shared": "b", "absent_tensors": []},
        "families.llama.indexer_sharing",
        "full",
    ),
    (
        ("families", "llama", "mergekit_yaml_result"),
        "good",
        "families.llama.mergekit_yaml_result",
        "'exact', 'config', 'tensors'",
    ),
    (
        ("families", "minimax", "identity_constants"),
        {"x": {}},
        "families.minimax.identity_constants.x",
        "value",
    ),
    (
        ("families", "llama", "llama_cpp_periods"),
        {"layer_types": [6, "full_attention"]},
        "families.llama",
        "'layer_types'",
    ),
    (
        ("families", "gemma3_text", "llama_cpp_periods"),
        {"layer_types": [6]},
        "families.gemma3_text.llama_cpp_periods.layer_types",
        "2 items",
    ),
    (("families", "llama", "depth_list"), 3, "families.llama.depth_list", "str or null"),
    (("families", "llama"), [], "families.llama", "mapping"),
    (("composites", "gemma3", "family"), "gemma33", "composites.gemma3", "'gemma33'"),
    (("reasons", "new"), "it is new", "reasons.new", "family"),
    (("assumed_family",), "lama", "assumed_family", "'lama'"),
    (("families", "a_new_type"), {}, "families", "sorted"),
    (("family",), {}, "architectures.json", "'family'"),
    (("quantized", "awq", "zeros"), "x", "architectures.json.quantized.awq", "'zeros'"),
]


@pytest.mark.parametrize(
    ("path", "value", "entry", "named"), FAULTS, ids=[f"{case[2]} {case[3]}" for case in FAULTS]
)
def test_a_fault_is_named_with_its_entry(
    path: tuple[str, ...], value: Any, entry: str, named: str
) -> None:
    """One wrong value gives one message, which names the entry and the fault."""
    data = copy.deepcopy(DATA)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (problem,) = architecture_data.problems(data)
    where, _, reason = problem.partition(": ")
    assert where == entry
    assert named in reason


def test_a_missing_section_and_a_wrong_task_are_named() -> None:
    """A missing section and a wrong task each give one message that names the file."""
    data = {key: value for key, value in DATA.items() if key != "reasons"}
    (problem,) = architecture_data.problems(data)
    assert re.match(r"architectures\.json: .*\breasons\b", problem)
    (problem,) = architecture_data.task_problems({"ForCausalLM": {"tag": "text-generation"}})
    assert re.match(r"tasks\.json\.ForCausalLM: .*\bload\b", problem)


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
        transformers4.Transformers4Data,
    ],
)
def test_every_key_is_documented(described: type) -> None:
    """The docstring of each class documents its keys and nothing else."""
    keys = [key for key, _ in architecture_data.documented(described)]
    names = set()
    for base in (*getattr(described, "__orig_bases__", ()), described):
        names |= set(getattr(base, "__annotations__", {}))
    names |= set(getattr(described, "__required_keys__", ()))
    assert sorted(keys) == sorted(names)


def test_the_reference_is_current() -> None:
    """The reference page is the output of tools/architecture_data.py."""
    assert architecture_data.PAGE.read_text(encoding="utf-8") == architecture_data.page()


def test_the_periodic_rules_are_known() -> None:
    """Each periodic rule exists in the code and has one key per number."""
    for name in families.known_types():
        family = families.family_of(name)
        assert family is not None
        for rule, *keys in family.facts.periodic_rules:
            numbers = per_layer_config._RULES[rule].__code__.co_argcount - 1  # type: ignore[attr-defined]  # noqa: SLF001
            assert len(keys) == numbers, (name, rule)


def test_only_what_code_sets_is_left_out_of_an_entry() -> None:
    """An attribute of a family is either set by code or a key of its entry, never both."""
    names = {item.name for item in dataclasses.fields(families.Family)}
    assert names >= architecture_data.SET_BY_CODE
    assert not architecture_data.SET_BY_CODE & architecture_data.entry_hints().keys()
