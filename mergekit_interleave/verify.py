"""Is OUT what its layout says? Every byte of its tensors, its index, its config.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave import (
    __version__,
    card,
    claim,
    forward,
    manifest,
    modelconfig,
    recipe,
    structure,
)
from mergekit_interleave.amounts import amount
from mergekit_interleave.assembly import Part
from mergekit_interleave.checkpoint import CONFIG
from mergekit_interleave.claim import Claim, Expected
from mergekit_interleave.comparison import Comparison, Difference, Leeway, compare
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    RefusedError,
)
from mergekit_interleave.expand import Models
from mergekit_interleave.preflight import TOKENIZER, vocab_size
from mergekit_interleave.reference import ModelRef
from mergekit_interleave.shards import INDEX, WEIGHTS, iterate_tensors, read_index, read_json
from mergekit_interleave.staging import replace_file

log = logging.getLogger(__name__)

TRAINED = "a new layer, which was trained"


@dataclass(frozen=True)
class Report:
    """What was verified, and what came of it.

    Attributes:
        against: What the sources are called; none where the model was compared with itself.
        weights: What came of the tensors; None where those of the model cannot be read.
        differences: All that is not as it must be, config.json included.
        trained: Whether new layers were free to differ.
        expected: What it must be.
    """

    against: Sequence[str]
    weights: Comparison | None
    differences: Sequence[Difference]
    trained: bool
    expected: Expected

    @property
    def is_exact(self) -> bool:
        """Whether the model is what its layout says."""
        return not self.differences

    @property
    def kind(self) -> str:
        """The word under which interleave.json keeps it."""
        return manifest.TRAINED if self.trained else manifest.WEIGHTS

    def outcome(self) -> dict[str, Any]:
        """What interleave.json keeps of it."""
        return outcome(self.weights, self.against, len(self.differences))


def outcome(
    weights: Comparison | None, against: Sequence[str], differences: int = 0
) -> dict[str, Any]:
    """What interleave.json keeps of a comparison.

    Args:
        weights: What came of the tensors, None where they could not be read.
        against: What the sources are called.
        differences: How many things are not as they must be.
    """
    found: dict[str, Any] = {"exact": not differences, "differences": differences}
    found |= {"against": list(against)} if against else {}
    if weights is not None:
        found |= {
            "tensors": weights.tensors,
            "bytes": weights.nbytes,
            "compared": weights.compared,
        }
        found |= {"not_compared": dict(weights.unread)} if weights.unread else {}
    return found | {"tools": {"mergekit-interleave": __version__}}


def verify(
    out: Path,
    models: Models,
    *,
    against: Sequence[ModelRef] = (),
    layout_from: Path | None = None,
    trained: bool = False,
) -> Report:
    """Compare a model with its sources, or with itself.

    Args:
        out: The model's directory.
        models: Where its sources are opened.
        against: Its sources, see `claim.of_sources`; none compares it with itself.
        layout_from: The file that says the layers, see `claim.read`.
        trained: New layers may hold anything.

    Raises:
        InterleaveError: It cannot be told what it must be, or a source cannot be read.
    """
    if not out.is_dir():
        raise CheckpointError(f"{out}: no such directory")
    if trained and not against:
        raise DirectiveError(
            "--trained: without the base there is nothing to compare with",
            hint="name it: --against MODEL",
        )
    trusted = models.trust_remote_code
    claimed = claim.read(out, layout_from)
    if against:
        expected = claim.of_sources(claimed, against, models)
    else:
        expected = claim.of_itself(claimed, out, models)
    differences: list[Difference] = []
    if layout_from is None and not trained:
        differences += _manifest(out, claimed, expected)
        differences += _recipe(out, expected)
    weights = None
    try:
        found = list(iterate_tensors(out))
        differences += _strays(out)
    except CheckpointError as error:
        differences.append(Difference(str(error)))
    else:
        weights = compare(
            found,
            expected.parts,
            _leeway(expected, _never_saved(out, trusted=trusted) if trained else None),
        )
        differences += weights.differences
        plan = expected.plan
        if plan is not None and recipe.changes_tokenizer(plan.mergekit):
            config = plan.config(vocab_size(dict(found), plan))
            expected = dataclasses.replace(expected, config=config)
    differences += _config(out, expected, trained=trained, trusted=trusted)
    plan = expected.plan
    names = [] if plan is None else [plan.public.title(model) for model in plan.sources]
    return Report(names, weights, differences, trained, expected)


def _leeway(expected: Expected, never_saved: Callable[[str], bool] | None) -> Leeway:
    """What may be otherwise; after training, what transformers does not save may be missing."""
    new = {layer.index for layer in expected.layout.new_layers} if never_saved else set()

    def unread(part: Part) -> str | None:
        return TRAINED if part.layer in new else expected.unread(part)

    return Leeway(
        unread=unread,
        any_dtype=lambda part: part.layer in new or part.model.lora is not None,
        any_rows=lambda part: part.layer is None and expected.unread(part) == TOKENIZER,
        may_lack=never_saved or (lambda _: False),
    )


def _never_saved(out: Path, *, trusted: bool) -> Callable[[str], bool]:
    """Whether transformers leaves a tensor out that the base has stored, though its class loads it.

    It saves what its class has in memory, and of tied tensors one.
    """
    known: list[Mapping[str, bool]] = []

    def may_lack(name: str) -> bool:
        if not known:  # to ask takes seconds, and most lack nothing
            known.append(structure.saved(out, trusted=trusted))
        return not known[0].get(name, False)

    return may_lack


def _strays(out: Path) -> Iterator[Difference]:
    """Weights that no index names: others might load them."""
    index = out / INDEX
    named = set(read_index(index).values()) if index.is_file() else {WEIGHTS}
    for file in sorted(out.glob("*.safetensors")):
        if file.name not in named:
            yield Difference(f"{file.name}: holds weights that no index names")


def _manifest(out: Path, claimed: Claim, expected: Expected) -> Iterator[Difference]:
    """Whether what was written about the model agrees with itself."""
    own = claimed.manifest
    if own is None:
        return
    for name in own.files:
        if not (out / name).is_file():
            yield Difference(f"{name}: is missing")
    if own.content.get("fingerprint") != manifest.fingerprint(expected.layout):
        yield Difference(f"{manifest.FILE}: its fingerprint is not that of its layers")
    says = own.content["layers"]
    for index, layer in enumerate(manifest.layers(expected.layout, expected.parts)):
        for key in layer.keys() | says[index].keys():
            if layer.get(key) != says[index].get(key):
                said = json.dumps(says[index].get(key))
                yield Difference(f"{manifest.FILE}: layer {index}: {key} is said to be {said:.100}")


def _recipe(out: Path, expected: Expected) -> Iterator[Difference]:
    """Whether mergekit_config.yml says the same layers."""
    if not (out / recipe.FILE).is_file():
        return
    try:
        other = claim.read(out, out / recipe.FILE).layout
    except InterleaveError as error:
        yield Difference(f"{recipe.FILE}: {error}")
    else:
        if manifest.fingerprint(other) != manifest.fingerprint(expected.layout):
            yield Difference(f"{recipe.FILE}: says other layers")


_IDLE = {"transformers_version", "_name_or_path"}
"""What a config may say without a consequence."""

_IDLE_TRAINED = {*_IDLE, "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
"""What trainers write there."""


def _config(out: Path, expected: Expected, *, trained: bool, trusted: bool) -> Iterator[Difference]:
    if expected.config is None:
        return
    try:
        found = read_json(out / CONFIG)
    except CheckpointError as error:
        yield Difference(str(error))
        return
    idle = _IDLE_TRAINED if trained else _IDLE
    wrong = _unlike(expected.config, found, idle)
    if wrong:
        # Another spelling may mean the same: transformers leaves out what its class has anyway.
        meant = [_meant(config, trusted=trusted) for config in (expected.config, found)]
        if meant[0] is not None and meant[1] is not None:
            unlike = _unlike(meant[0], meant[1], idle)
            wrong = {key: wrong[key] for key in wrong if key in unlike} or unlike
    for key, (wanted, got) in wrong.items():
        yield Difference(
            f"{CONFIG}: {key} is {json.dumps(got):.100}, not {json.dumps(wanted):.100}"
        )


def _unlike(
    wanted: Mapping[str, Any], found: Mapping[str, Any], idle: Collection[str]
) -> dict[str, tuple[object, object]]:
    pairs = modelconfig.differences(wanted, found)
    return {
        key: pair
        for key, pair in pairs
        if key.rpartition(".")[2] not in idle and not _is_dtype_of_a_part(key, pair)
    }


def _is_dtype_of_a_part(key: str, pair: tuple[object, object]) -> bool:
    """Whether a part states a dtype that it has from the whole: transformers writes it down."""
    part, _, name = key.rpartition(".")
    return bool(part) and name in ("dtype", "torch_dtype") and None in pair


def _meant(config: Mapping[str, Any], *, trusted: bool) -> Mapping[str, Any] | None:
    """A config as its class reads it; None where that cannot be told."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, CONFIG).write_text(json.dumps(config), encoding="utf-8")
            return modelconfig.as_read(Path(folder), trusted=trusted)
    except RefusedError:
        return None


def record(out: Path, kind: str, found: Mapping[str, Any]) -> None:
    """Write what was verified into interleave.json and the card; that it cannot is no failure.

    Args:
        out: The model's directory.
        kind: What was compared.
        found: What came of it.
    """
    try:
        verified = manifest.record(out, kind, found)
        page = out / card.FILE
        if verified is not None and page.is_file() and not page.is_symlink():
            text = page.read_text(encoding="utf-8")
            changed = card.reverified(text, verified)
            if changed != text:
                replace_file(page, changed)
    except (InterleaveError, OSError, ValueError, LookupError, TypeError) as error:
        log.warning("what was verified could not be written down: %s", error)


def measure(out: Path, report: Report, most_memory: int | None = None) -> dict[str, Any]:
    """Compare what a model computes with what its base computes.

    Args:
        out: The model's directory.
        report: What came of its weights, which its sources were at hand for.
        most_memory: The most bytes for weights, see `forward.compare`.

    Raises:
        RefusedError: They cannot be compared.
    """
    plan = report.expected.plan
    if plan is None:
        raise TypeError("the sources are needed")
    if recipe.changes_tokenizer(plan.mergekit):
        raise RefusedError(f"{out}: has another tokenizer than its base, so other logits")
    found = forward.compare(
        plan.base.store, out, trust_remote_code=plan.base.trusted, most_memory=most_memory
    )
    identity = plan.is_identity and plan.conversion is None and not report.trained
    return found.outcome(identity=identity)


FORWARD = manifest.FORWARD

_SHOWN = 10


def words(out: Path, report: Report, measured: Mapping[str, Any] | None) -> Iterator[str]:
    """A report as lines for a person.

    Args:
        out: The model's directory.
        report: What came of its weights.
        measured: What came of a forward pass, if there was one.
    """
    layout, weights = report.expected.layout, report.weights
    for difference in report.differences[:_SHOWN]:
        yield str(difference)
    if len(report.differences) > _SHOWN:
        yield f"and {len(report.differences) - _SHOWN} more"
    if report.is_exact:
        new = f"{len(layout)} layers, {len(layout.new_layers)} of them new"
        how = "exactly what its layout says" if report.against else "nothing speaks against it"
        yield f"{out}: {new}: {how}"
    if weights is not None:
        against = " and ".join(report.against) or "one another"
        compared = weights.tensors - sum(weights.unread.values())
        yield (
            f"weights: {compared:,} of {weights.tensors:,} tensors compared with {against}, "
            f"{amount(weights.compared)}"
        )
        for reason, count in weights.unread.items():
            yield f"         {count:,} not: {reason}"
    if measured is not None:
        yield f"forward: {card.forward(measured)}"


def as_json(report: Report, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """A report as a program reads it."""
    found = {**report.outcome(), "trained": report.trained}
    found["differences"] = [difference._asdict() for difference in report.differences]
    return found if measured is None else {**found, "forward": dict(measured)}


def check(out: Path, report: Report, measured: Mapping[str, Any] | None) -> None:
    """Check that nothing was found.

    Raises:
        RefusedError: Something was.
    """
    if not report.is_exact:
        count = len(report.differences)
        places = "1 place" if count == 1 else f"{count} places"
        raise RefusedError(f"{out}: is not what its layout says, in {places}")
    if measured is not None and measured.get("exact") is False:
        raise RefusedError(f"{out}: does not compute what its base computes")
