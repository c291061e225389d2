"""Check the files beside the weights: config.json, interleave.json and others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes, _out_files
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint.checkpoint import CONFIG, MAX_CONFIG
from mergekit_interleave.checkpoint.safetensors_header import INDEX, WEIGHTS, read_index, read_json
from mergekit_interleave.errors import CheckpointError, InterleaveError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import manifest, recorded_layout
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.verification.expected import ExpectedModel
from mergekit_interleave.verification.tensors import Difference


def of_words(
    out: Path, claimed: RecordedLayout, expected: ExpectedModel, *, trained: bool
) -> list[Difference]:
    """Check that the files that describe a model agree with each other.

    Args:
        out: The model's directory.
        claimed: Its recorded layout.
        expected: What the model must contain.
        trained: Whether a trainer has written the model since.
    """
    found = [*_recipe(out, claimed, expected)]
    if claimed.manifest is not None:
        found += _manifest(claimed.manifest, expected, trained=trained)
        if not trained:
            found += _files(out, claimed.manifest, expected.plan)
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
        trained: Whether a trainer has written the model since.
        trusted: Whether code that the model brings may be run.
        stored: Dtypes that config.json may state because a trainer has stored tensors in them.
    """
    return list(_config(out, expected, stored, trained=trained, trusted=trusted))


def of_weights(out: Path) -> Iterator[Difference]:
    """Find weights that no index names, and adapters that would be loaded.

    Args:
        out: The model's directory.
    """
    index = out / INDEX
    named = set(read_index(index).values()) if index.is_file() else {WEIGHTS}
    for file in sorted(out.glob("*.safetensors")):
        if file.name not in named:
            yield Difference(f"{file.name}: contains weights that no index names")
    if (out / "adapter_config.json").exists():
        yield Difference("adapter_config.json: loads an adapter that is not part of the layout")


def _manifest(
    own: manifest.Manifest, expected: ExpectedModel, *, trained: bool
) -> Iterator[Difference]:
    """Check interleave.json against itself, the tensors, and the plan that made them."""
    if own.content.get("fingerprint") != manifest.fingerprint(expected.layout):
        yield Difference(f"{manifest.FILE}: the fingerprint does not match the layers")
    plan = expected.plan
    found = manifest.totals(expected.layout, expected.specs, packed=False)
    found |= {} if plan is None else manifest.facts(plan)
    for key, value in ({} if trained else found).items():
        if own.content.get(key, value) != value:
            said = json.dumps(own.content[key])
            yield Difference(f"{manifest.FILE}: {key} should not be {said:.100}")
    says = own.content["layers"]
    for index, layer in enumerate(manifest.layers(expected.layout, expected.specs)):
        for key in layer.keys() | says[index].keys():
            if layer.get(key) != says[index].get(key):
                said = json.dumps(says[index].get(key))
                yield Difference(f"{manifest.FILE}: layer {index}: {key} should not be {said:.100}")


def _files(out: Path, own: manifest.Manifest, plan: ExpansionPlan | None) -> Iterator[Difference]:
    """Check that all files of the run exist, and that copied files equal those of the base."""
    for name in own.files:
        if not _out_files.is_replaceable(name) and not (out / name).is_file():
            yield Difference(f"{name}: is missing")
    if plan is None:
        return
    for name, wanted in plan.carried(lambda _: None):  # `run` has warned
        if (out / name).is_file() and not _holds(out / name, wanted):
            yield Difference(f"{name}: differs from the base's file")


def _holds(file: Path, content: bytes) -> bool:
    return file.stat().st_size == len(content) and file.read_bytes() == content


def _recipe(out: Path, claimed: RecordedLayout, expected: ExpectedModel) -> Iterator[Difference]:
    """Check that mergekit_config.yml states the same layers and dtype."""
    if not (out / mergekit_yaml.FILE).is_file():
        return
    try:
        other = recorded_layout.read(out, out / mergekit_yaml.FILE)
        layout = other.layout
    except InterleaveError as error:
        yield Difference(f"{mergekit_yaml.FILE}: {error}")
        return
    if manifest.fingerprint(layout) != manifest.fingerprint(expected.layout):
        yield Difference(f"{mergekit_yaml.FILE}: states other layers")
    if mergekit_yaml.dtypes_of(other.directive.mergekit) != mergekit_yaml.dtypes_of(
        claimed.directive.mergekit
    ):
        yield Difference(f"{mergekit_yaml.FILE}: states another dtype")


_IDLE = {"transformers_version", "_name_or_path"}
"""Keys of a config that have no effect."""

_IDLE_TRAINED = {*_IDLE, "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Keys that trainers write as well."""


def _config(
    out: Path, expected: ExpectedModel, stored: Collection[str], *, trained: bool, trusted: bool
) -> Iterator[Difference]:
    if expected.config is None:
        return
    try:
        found = read_json(out / CONFIG, most=MAX_CONFIG)
    except CheckpointError as error:
        yield Difference(str(error))
        return
    idle = _IDLE_TRAINED if trained else _IDLE
    wrong = _unlike(expected.config, found, idle)
    if wrong and not _is_too_deep(found):
        # A config may be written differently and mean the same: transformers omits defaults.
        meant, said = (_meant(config, trusted=trusted) for config in (expected.config, found))
        if meant is not None and said is not None:
            unlike = _unlike(meant, said, idle)
            # Keys that the class consumes, such as which kernels to load, it does not write again.
            extra = {key for key, (wanted, _) in wrong.items() if wanted is None} - _keys(said)
            named = {key: pair for key, pair in wrong.items() if key in unlike or key in extra}
            wrong = named or unlike
    for key, (wanted, got) in wrong.items():
        dtype = _dtypes.NAMED.get(str(got))
        if key.rpartition(".")[2] in _DTYPE and dtype and dtype.stored in stored:
            continue
        yield Difference(
            f"{CONFIG}: {key} is {json.dumps(got):.100}, not {json.dumps(wanted):.100}"
        )


def _keys(config: Mapping[str, Any], place: str = "") -> set[str]:
    """All keys of a config; those of nested configs with a dot."""
    found = {f"{place}{key}" for key in config}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _keys(value, f"{place}{key}.")
    return found


def _is_too_deep(config: Mapping[str, Any]) -> bool:
    """Whether the config states so many layers that its class would never finish."""
    specs = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    depths = [part.get(key) for part in specs for key in families.depth_keys()]
    return any(isinstance(depth, int) and depth > MAX_LAYERS for depth in depths)


def _unlike(
    wanted: Mapping[str, Any], found: Mapping[str, Any], idle: Collection[str]
) -> dict[str, tuple[object, object]]:
    pairs = grown_config.differences(wanted, found)
    return {
        key: pair
        for key, pair in pairs
        if key.rpartition(".")[2] not in idle and not _is_dtype_of_a_part(key, pair)
    }


def _is_dtype_of_a_part(key: str, pair: tuple[object, object]) -> bool:
    """Whether a nested config states a dtype that it inherits: transformers writes it out."""
    part, _, name = key.rpartition(".")
    return bool(part) and name in _DTYPE and None in pair


_DTYPE = ("dtype", "torch_dtype")


def _meant(config: Mapping[str, Any], *, trusted: bool) -> Mapping[str, Any] | None:
    """A config as its class reads it; None if the class cannot read it."""
    try:
        with scratch_directory() as folder:
            (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            return grown_config.as_read(folder, trusted=trusted)
    except (OSError, RefusedError):
        return None
