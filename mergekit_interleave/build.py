"""`run`: preflight, staging, engine, config, small files, card, check, one rename."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_interleave import (
    card,
    manifest,
    measure,
    modelconfig,
    nearby,
    recipe,
    smallfiles,
    structure,
    weights,
    yamltext,
)
from mergekit_interleave.assembly import Written, check_written
from mergekit_interleave.checkpoint import CONFIG
from mergekit_interleave.engines import mergekit
from mergekit_interleave.errors import (
    RefusedError,
    UnsayableError,
)
from mergekit_interleave.expand import Expansion, Models
from mergekit_interleave.layout import Layout
from mergekit_interleave.preflight import Preflight, preflight
from mergekit_interleave.shards import check_unchanged, iterate_tensors, read_tensors
from mergekit_interleave.staging import check_vacant, files_below, staged
from mergekit_interleave.weights import MERGEKIT, How, Outcome

log = logging.getLogger(__name__)

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        weights: How to write the weights.
        replace: Replace a model that stands at OUT.
        base_model: The Hub id of the base, where its directory does not tell.
        verify: Read back what was written.
    """

    weights: How = field(default_factory=How)
    replace: bool = False
    base_model: str | None = None
    verify: bool = True


@dataclass(frozen=True)
class Report:
    """What was made.

    Attributes:
        layout: Its layers.
        written: How much it is.
        outcome: How that came there.
    """

    layout: Layout
    written: Written
    outcome: Outcome


def run(expansion: Expansion, models: Models, out: Path, options: Options) -> Report:
    """Make the deeper model.

    Args:
        expansion: What to make.
        models: Where its source models are opened.
        out: Where it is to appear.
        options: How.

    Raises:
        InterleaveError: It cannot be made, and nothing is at OUT.
    """
    try:
        return _run(expansion, models, out, options)
    except UnsayableError as error:
        mergekit.quieten(options.weights.mergekit.get("verbosity"))
        base = models.open(expansion.layout.models[0])
        works = nearby.suggestion(base, expansion.directive, expansion.layout)
        error.hint = f"this would do: {works}" if works else None
        raise


def _run(expansion: Expansion, models: Models, out: Path, options: Options) -> Report:
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT if it is a link
    check_vacant(out, replace=options.replace)
    how = options.weights
    weights.check(how, expansion)
    plan = preflight(expansion, models, out, base_model=options.base_model, mix=how.mixes)
    measured = plan.first.require_family().measured
    with staged(out, replace=options.replace) as work:
        writer = weights.Writer(plan, work, how)
        writer.check_room()
        if not how.streams:
            mergekit.quieten(how.mergekit.get("verbosity"))
        _write_json(work / CONFIG, plan.config())
        _copy_small_files(plan, work)
        if measured or not how.streams:
            _check_classes(plan, work)
        if measured and not plan.is_identity:
            raise RefusedError(
                f"nothing is known of model type {plan.first.model_type!r}: only an expansion "
                "that computes what its base computes can be measured",
                hint="zero the new layers' residual writers",
            )
        outcome = writer.write()
        check_unchanged(part.tensor for part in plan.parts)
        new_vocabulary = recipe.changes_tokenizer(plan.mergekit)
        written = check_written(
            iterate_tensors(work),
            plan.parts,
            any_rows_outside=new_vocabulary,
            any_dtype=plan.uses_lora and "lora_merge_dtype" in how.mergekit,
            # mergekit multiplies: an infinity times 0 is no zero. The other engine writes zeros.
            zeros=options.verify or outcome.engine == MERGEKIT,
        )
        if measured:
            measure.check(plan.first.path, work, trust_remote_code=plan.first.trusted)
        if new_vocabulary:
            _write_json(work / CONFIG, plan.config(_vocab_size(work, plan)))
        (work / recipe.FILE).write_text(plan.recipe, encoding="utf-8")
        _write_card(plan, out.name, work / CARD_FILE, outcome.beyond)
        files = sorted({*files_below(work), manifest.FILE})
        _write_json(work / manifest.FILE, manifest.describe(plan, files, outcome.engine))
    return Report(plan.layout, written, outcome)


def _check_classes(plan: Preflight, work: Path) -> None:
    """What the class that loads the result makes of it; the data alone says it, if it is right.

    Loading transformers for it takes longer than the stream engine may, which does without.
    """
    if len(plan.sources) > 1:  # several are stacked only where all layers are alike
        structure.shapes(work, trusted=plan.first.trusted)
    else:
        structure.check(plan.first, plan.layout, work, plan.placement.borrowers)


def _copy_small_files(plan: Preflight, work: Path) -> None:
    for name, file in plan.small_files:
        content = smallfiles.read(name, file, plan.base)
        if content is not None:
            target = work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            moved = modelconfig.moved_file(name, content, plan.first, plan.layout)
            target.write_bytes(moved)


def _vocab_size(work: Path, plan: Preflight) -> int:
    """The rows of the embeddings that mergekit made for another tokenizer."""
    before = plan.first.require_family().before_layers
    if not before:
        raise RefusedError("which tensor holds the embeddings of this model type is not known")
    return read_tensors(work)[before[0]].shape[0]


def _write_card(plan: Preflight, name: str, file: Path, beyond: str | None) -> None:
    """Write the card; a card that cannot be written never costs the model."""
    try:
        layout, public = plan.layout, plan.public
        origins = [public.origins[model] for model in layout.models if model in public.origins]
        facts = card.Facts(
            name=name,
            layout=layout,
            sources=list(dict.fromkeys(map(public.title, layout.models))),
            names=[public.title(model) for model in layout.models],
            base_models=list(dict.fromkeys(origin.path for origin in origins)),
            base_card=card.read_front_matter(plan.base.path),
            directive=yamltext.write(manifest.directive_of(plan)),
            recipe=plan.recipe,
            depth=plan.first.depth,
            parameters=(
                plan.parameters,
                sum(tensor.elements for tensor in plan.first.tensors.values()),
            ),
            identities=plan.identities,
            identity=plan.is_identity,
            conversion=plan.conversion,
            fingerprint=manifest.fingerprint(layout),
            beyond_mergekit=beyond,
        )
        file.write_text(card.write(facts), encoding="utf-8")
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights are worth more
        log.warning("the model card could not be written: %s", error)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
