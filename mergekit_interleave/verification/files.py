"""Check the files beside the weights: config.json, interleave.json and others."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes, _out_files
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import adapter
from mergekit_interleave.checkpoint.checkpoint import CONFIG, MAX_CONFIG
from mergekit_interleave.checkpoint.safetensors_header import INDEX, WEIGHTS, read_index, read_json
from mergekit_interleave.errors import CheckpointError, InterleaveError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import manifest, recorded_layout
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import grown_config, legacy_config
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.verification.expected import ExpectedModel
from mergekit_interleave.verification.stored_bytes import Difference


def of_records(
    out: Path, recorded: RecordedLayout, expected: ExpectedModel, *, trained: bool
) -> list[Difference]:
    """Check that interleave.json and mergekit_config.yml agree, and that copied files are intact.

    Args:
        out: The model's directory.
        recorded: Its recorded layout.
        expected: What the model must contain.
        trained: Whether a trainer has written the model since `run` did.
    """
    found = [*_recipe(out, recorded, expected)]
    if recorded.manifest is not None:
        found += _manifest(recorded.manifest, expected, trained=trained)
        if not trained and recorded.manifest.content.get("engine") != manifest.SAVED:
            found += _files(out, recorded.manifest, expected.plan)
    return found


def of_config(
    out: Path,
    expected: ExpectedModel,
    *,
    trained: bool,
    trusted: bool,
    stored: Collection[str] = (),
) -> list[Difference]:
    """Check config.json.

    Args:
        out: The model's directory.
        expected: What the model must contain.
        trained: Whether a trainer has written the model since `run` did.
        trusted: Whether code from the model may be run.
        stored: Dtypes that config.json may also state, because a trainer has stored tensors in
            them.
    """
    return list(_config(out, expected, stored, trained=trained, trusted=trusted))


def of_weights(out: Path) -> Iterator[Difference]:
    """Find weights that the index does not list, and adapters that would be loaded.

    Args:
        out: The model's directory.
    """
    index = out / INDEX
    listed = set(read_index(index).values()) if index.is_file() else {WEIGHTS}
    for file in sorted(out.glob("*.safetensors")):
        if file.name not in listed:
            yield Difference(f"{file.name}: is not in the index, so it would not be loaded")
    if adapter.is_adapter(out):
        yield Difference(
            f"{adapter.CONFIG}: is not part of the layout; transformers would load its adapter"
        )


def _in_file(name: str, what: str) -> Difference:
    """Return a difference in a file beside the weights."""
    return Difference(f"{name}: {what}", file=name)


def _manifest(
    recorded: manifest.Manifest, expected: ExpectedModel, *, trained: bool
) -> Iterator[Difference]:
    """Check interleave.json against itself, the tensors, and the plan that made them."""
    content = recorded.content
    if content.get("fingerprint") != fingerprint(expected.layout):
        yield _in_file(manifest.FILE, "the fingerprint does not match the layers")
    plan = expected.plan
    entries = manifest.totals(expected.layout, expected.specs, packed=False)
    entries |= {} if plan is None else manifest.facts(plan)
    counted = () if not _calls_scaled_new(content, expected.layout) else ("new", "new_parameters")
    for key, value in ({} if trained else entries).items():
        if key not in counted and content.get(key, value) != value:
            yield _in_file(manifest.FILE, f"{key} is {_found_and_expected(content[key], value)}")
    for index, layer in enumerate(manifest.layers(expected.layout, expected.specs)):
        stated = content["layers"][index]
        for key in (layer.keys() | stated.keys()) - {*counted}:
            if _unordered(layer.get(key)) != _unordered(stated.get(key)):
                values = _found_and_expected(stated.get(key, _MISSING), layer.get(key, _MISSING))
                yield _in_file(manifest.FILE, f"layer {index}: {key} is {values}")


def _calls_scaled_new(content: Mapping[str, Any], layout: Layout) -> bool:
    """Return whether the file calls every scaled layer new, as release 0.2.0 and earlier did."""
    stated = [layer.get("new") for layer in content["layers"]]
    former = [layer.is_copy or not layer.is_plain for layer in layout.layers]
    return stated == former != [layer.new for layer in layout.layers]


def _unordered(value: object) -> object:
    """Return a list of names in sorted order; a tensor's place depends on who wrote the shard."""
    is_names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return sorted(value) if isinstance(value, list) and is_names else value


_MISSING = object()
"""Stands for the value of a key that a JSON object does not have."""


def _found_and_expected(found: object, expected: object) -> str:
    """Write the found and the expected value of a JSON key as text; either may be `_MISSING`."""
    is_found = "missing" if found is _MISSING else f"{json.dumps(found):.100}"
    is_expected = "no such key" if expected is _MISSING else f"{json.dumps(expected):.100}"
    return f"{is_found}, expected {is_expected}"


def _files(
    out: Path, recorded: manifest.Manifest, plan: ExpansionPlan | None
) -> Iterator[Difference]:
    """Check that all files of the run exist, and that copied files equal those of the base."""
    for name in recorded.files:
        if not _out_files.is_replaceable(name) and not (out / name).is_file():
            yield _in_file(name, "is missing")
    if plan is None:
        return
    for name, content in plan.carried(lambda _: None):  # `run` printed the warnings
        if (out / name).is_file() and not _has_content(out / name, content):
            yield _in_file(name, "differs from the file of the base")


def _has_content(file: Path, content: bytes) -> bool:
    return file.stat().st_size == len(content) and file.read_bytes() == content


def _recipe(out: Path, recorded: RecordedLayout, expected: ExpectedModel) -> Iterator[Difference]:
    """Check that mergekit_config.yml states the same layers and dtype."""
    if not (out / mergekit_yaml.FILE).is_file():
        return
    try:
        recipe = recorded_layout.read(out, out / mergekit_yaml.FILE)
        layout = recipe.layout
    except InterleaveError as error:
        yield _in_file(mergekit_yaml.FILE, str(error))
        return
    if fingerprint(layout) != fingerprint(expected.layout):
        yield _in_file(mergekit_yaml.FILE, f"its layers differ from those in {manifest.FILE}")
    if mergekit_yaml.dtypes_of(recipe.directive.mergekit) != mergekit_yaml.dtypes_of(
        recorded.directive.mergekit
    ):
        yield _in_file(mergekit_yaml.FILE, f"its dtype differs from that in {manifest.FILE}")


_IGNORED = {"transformers_version", "_name_or_path"}
"""Keys of a config that have no effect."""

_IGNORED_AFTER_TRAINING = {*_IGNORED, "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
"""The keys in `_IGNORED`, and keys that trainers change without changing the weights."""


def _config(
    out: Path, expected: ExpectedModel, stored: Collection[str], *, trained: bool, trusted: bool
) -> Iterator[Difference]:
    if expected.config is None:
        return
    try:
        found = read_json(out / CONFIG, most=MAX_CONFIG)
    except CheckpointError as error:
        yield Difference(str(error), file=CONFIG)
        return
    ignored = _IGNORED_AFTER_TRAINING if trained else _IGNORED
    wrong = _wrong_keys(expected.config, found, ignored, trusted=trusted)
    keys, expected_keys = _keys(found), _keys(expected.config)
    for key, (wanted, value) in wrong.items():
        if _is_close(wanted, value, expected.rounding):
            continue
        dtype = _dtypes.NAMED.get(str(value))
        if key.rpartition(".")[2] in _DTYPE and dtype and dtype.stored in stored:
            continue
        values = _found_and_expected(
            _MISSING if value is None and key not in keys else value,
            _MISSING if wanted is None and key not in expected_keys else wanted,
        )
        yield _in_file(CONFIG, f"{key} is {values}")
    if expected.plan is not None and expected.plan.legacy:  # transformers 5 ignores these keys
        for key, (right, read) in legacy_config.misread(found).items():
            values = _found_and_expected(read, right)
            yield _in_file(CONFIG, f"{key} is {values} (for transformers 4)")


def _wrong_keys(
    wanted: Mapping[str, Any], found: Mapping[str, Any], ignored: Collection[str], *, trusted: bool
) -> dict[str, tuple[object, object]]:
    """Return the keys of config.json that differ and have an effect, with both values."""
    wrong = _differing_keys(wanted, found, ignored)
    if wrong:  # `fix-config` records its additions only if there is an interleave.json
        for_both = _differing_keys(legacy_config.readable(wanted), found, ignored)
        wrong = {key: pair for key, pair in wrong.items() if key in for_both}
    if wrong and not _is_too_deep(found):
        # Different JSON may load as the same config: transformers omits defaults.
        loaded, loaded_found = (_as_loaded(config, trusted=trusted) for config in (wanted, found))
        if loaded is not None and loaded_found is not None:
            differing = _differing_keys(loaded, loaded_found, ignored)
            # The class does not write keys that it consumes, such as those that select kernels.
            extra = {key for key, (value, _) in wrong.items() if value is None}
            extra -= _keys(loaded_found)
            as_written = {
                key: pair for key, pair in wrong.items() if key in differing or key in extra
            }
            return as_written or differing
    return wrong


def _is_close(wanted: object, found: object, rounding: float) -> bool:
    """Return whether two numbers differ by no more than the rounding."""
    if not (isinstance(wanted, float) and isinstance(found, float)):
        return False
    return math.isclose(wanted, found, rel_tol=rounding)


def _keys(config: Mapping[str, Any], place: str = "") -> set[str]:
    """Return all keys of a config; the keys of nested configs are joined with a dot."""
    found = {f"{place}{key}" for key in config}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _keys(value, f"{place}{key}.")
    return found


def _is_too_deep(config: Mapping[str, Any]) -> bool:
    """Return whether a config has so many layers that building its class would never finish."""
    specs = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    depths = [part.get(key) for part in specs for key in families.depth_keys()]
    return any(isinstance(depth, int) and depth > MAX_LAYERS for depth in depths)


def _differing_keys(
    wanted: Mapping[str, Any], found: Mapping[str, Any], ignored: Collection[str]
) -> dict[str, tuple[object, object]]:
    """Return the keys in which two configs differ, with both values."""
    pairs = grown_config.differences(wanted, found)
    return {
        key: pair
        for key, pair in pairs
        if key.rpartition(".")[2] not in ignored and not _is_dtype_of_a_part(key, pair)
    }


def _is_dtype_of_a_part(key: str, pair: tuple[object, object]) -> bool:
    """Return whether just one of two nested configs has a dtype, which transformers may add."""
    part, _, name = key.rpartition(".")
    return bool(part) and name in _DTYPE and None in pair


_DTYPE = ("dtype", "torch_dtype")


def _as_loaded(config: Mapping[str, Any], *, trusted: bool) -> Mapping[str, Any] | None:
    """Return a config as its class reads it, or None if the class cannot read it."""
    try:
        with scratch_directory() as folder:
            (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            return grown_config.as_read(folder, trusted=trusted)
    except (OSError, RefusedError):
        return None
