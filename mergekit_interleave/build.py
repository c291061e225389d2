"""`run`: preflight, staging, engine, config, small files, card, check, one rename."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_interleave import architecture, card, manifest, modelconfig, recipe
from mergekit_interleave.assembly import EMBEDDINGS, Part, assemble
from mergekit_interleave.checkpoint import CONFIG, Checkpoint, Tensor, read_tensors
from mergekit_interleave.engines import mergekit as engine
from mergekit_interleave.errors import LayoutError, OutputError, RefusedError
from mergekit_interleave.expand import Expansion, Models
from mergekit_interleave.layout import Layout
from mergekit_interleave.naming import PublicNames
from mergekit_interleave.reference import ModelRef, parse_model
from mergekit_interleave.staging import check_vacant, staged

log = logging.getLogger(__name__)

RECIPE_FILE = "mergekit_config.yml"
CARD_FILE = "README.md"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# What two models must agree in for their layers to be stacked.
_MUST_FIT = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        replace: Replace a model that stands at OUT.
        shard_size: The most bytes of one shard.
        base_model: The Hub id of the base, where its directory does not tell.
        mergekit: mergekit's own options.
    """

    replace: bool = False
    shard_size: int = 5 * 10**9
    base_model: str | None = None
    mergekit: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was made."""

    layout: Layout
    parameters: int
    nbytes: int


def run(expansion: Expansion, models: Models, out: Path, options: Options) -> Report:
    """Make the deeper model.

    Args:
        expansion: What to make.
        models: Where its source models are opened, with their weights.
        out: Where it is to appear.
        options: How.

    Raises:
        InterleaveError: It cannot be made, and nothing is at OUT.
    """
    check_vacant(out, replace=options.replace)
    plan = _Preflight.of(expansion, models, options)
    plan.check_apart(out)
    with staged(out, replace=options.replace) as work:
        plan.check_room(out)
        _write_json(work / CONFIG, plan.config)
        for name, file in plan.small_files:
            target = work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        scratch = work / ".lora"
        job = engine.Job(
            expansion.layout,
            plan.parts,
            expansion.directive.mergekit,
            plan.checkpoints,
            options.mergekit,
            options.shard_size,
            scratch,
        )
        _write_weights(job, work)
        shutil.rmtree(scratch, ignore_errors=True)
        written = read_tensors(work)
        _check_written(written, plan)
        if plan.changes_tokenizer:
            _write_json(work / CONFIG, plan.config | {"vocab_size": written[EMBEDDINGS].shape[0]})
        (work / RECIPE_FILE).write_text(plan.recipe, encoding="utf-8")
        _write_json(work / manifest.FILE, plan.manifest)
        _write_card(plan, out.name, work / CARD_FILE)
    nbytes = sum(tensor.nbytes for tensor in written.values())
    return Report(expansion.layout, sum(t.elements for t in written.values()), nbytes)


@dataclass(frozen=True)
class _Preflight:
    """All that is settled before a byte is written."""

    expansion: Expansion
    checkpoints: Mapping[ModelRef, Checkpoint]
    base: Checkpoint
    parts: Sequence[Part]
    config: dict[str, Any]
    public: PublicNames

    @classmethod
    def of(cls, expansion: Expansion, models: Models, options: Options) -> _Preflight:
        layout, keys = expansion.layout, expansion.directive.mergekit
        checkpoints = {model: models.open(model) for model in layout.models}
        base = checkpoints[layout.slices[0].model]
        if "base_model" in keys:
            ref = parse_model(keys["base_model"], "base_model")
            base = checkpoints[ref] = models.open(ref)
        for checkpoint in checkpoints.values():
            checkpoint.require_family()  # refuses before anything is fetched
            if not _is_true(options.mergekit.get("allow_crimes")):
                _check_fit(checkpoint, base)
        for checkpoint in checkpoints.values():
            models.fetch_weights(checkpoint)
        dtype = keys.get("out_dtype", keys.get("dtype"))
        dtype = None if dtype is None else str(dtype)
        return cls(
            expansion=expansion,
            checkpoints=checkpoints,
            base=base,
            parts=assemble(layout, checkpoints, dtype),
            config=modelconfig.deepened(base.config, depth=len(layout), dtype=dtype),
            public=PublicNames.of(checkpoints, options.base_model),
        )

    @property
    def changes_tokenizer(self) -> bool:
        return any(key in self.expansion.directive.mergekit for key in engine.TOKENIZER_KEYS)

    @property
    def small_files(self) -> list[tuple[str, Path]]:
        """The base's files to copy, by their names below the directory."""
        files = []
        for name, file in self.base.small_files():
            if self.changes_tokenizer and name in _TOKENIZER_FILES:
                continue
            if self.base.too_large_to_carry(file):
                log.warning("%s is not copied: it is larger than any file a model needs", name)
            else:
                files.append((name, file))
        return files

    @property
    def recipe(self) -> str:
        return recipe.to_yaml(self.expansion.layout, self.expansion.directive.mergekit, self.public)

    @property
    def manifest(self) -> dict[str, Any]:
        expansion = self.expansion
        return manifest.describe(
            expansion.directive, expansion.layout, self.parts, self.checkpoints, self.public
        )

    @property
    def converts(self) -> bool:
        """Whether any tensor is written in another dtype than its own."""
        return any(part.dtype != part.tensor.dtype for part in self.parts)

    @property
    def is_identity(self) -> bool:
        """Whether the result computes what its base computes, conversion apart."""
        layout, keys = self.expansion.layout, self.expansion.directive.mergekit
        family = self.base.require_family()
        if len(layout.models) > 1 or layout.models[0].lora:
            return False
        if "parameters" in keys or self.changes_tokenizer:
            return False
        if [layer.source for layer in layout.layers if not layer.new] != list(
            range(self.base.depth)
        ):
            return False
        try:
            for layer in layout.new_layers:
                names = self.base.layer_tensors(layer.source)
                architecture.check_identity(layer.scales, names, family)
                if not layer.zeroed:
                    return False
        except LayoutError:
            return False
        return True

    def check_apart(self, out: Path) -> None:
        """Check that OUT is no source model and holds none, which --force would destroy.

        Raises:
            OutputError: It is, or does.
        """
        place = out.resolve()
        for checkpoint in self.checkpoints.values():
            source = checkpoint.path.resolve()
            if place == source or place in source.parents:
                raise OutputError(f"{out}: is, or holds, the source model {checkpoint.ref}")

    def check_room(self, out: Path) -> None:
        """Check that the disk has room for the result.

        Raises:
            OutputError: It has not.
        """
        needed = sum(part.nbytes for part in self.parts)
        needed += sum(file.stat().st_size for _, file in self.small_files)
        if any(model.lora for model in self.checkpoints):
            needed += sum(tensor.nbytes for tensor in self.base.tensors.values())
        free = shutil.disk_usage(out.absolute().parent).free
        if needed > free:
            raise OutputError(
                f"{out}: no room: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free"
            )


def _write_weights(job: engine.Job, work: Path) -> None:
    try:
        engine.write(job, work)
    except OSError as error:
        raise OutputError(f"the weights cannot be written: {error.strerror or error}") from error


def _check_fit(model: Checkpoint, base: Checkpoint) -> None:
    for key in _MUST_FIT:
        ours, theirs = model.config.get(key), base.config.get(key)
        if ours != theirs:
            raise RefusedError(
                f"{model.ref} does not fit {base.ref}: {key} is {ours!r}, not {theirs!r}",
                hint="--mergekit allow_crimes=true to insist",
            )


def _check_written(written: Mapping[str, Tensor], plan: _Preflight) -> None:
    """Check names, shapes and dtypes of what the engine wrote.

    Raises:
        OutputError: They are not what the layout calls for.
    """
    expected = {part.name: part for part in plan.parts}
    for name in sorted(expected.keys() ^ written.keys()):
        what = "is missing" if name in expected else "is one too many"
        raise OutputError(f"the weights came out wrong: {name} {what}")
    layers = plan.base.require_family().layers
    for name, part in expected.items():
        # Another tokenizer has another number of rows in the embeddings and the head.
        rows_may_differ = plan.changes_tokenizer and not name.startswith(layers)
        skip = 1 if rows_may_differ else 0
        tensor = written[name]
        if tensor.shape[skip:] != part.tensor.shape[skip:] or tensor.dtype != part.dtype:
            raise OutputError(
                f"the weights came out wrong: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"not {part.dtype} {list(part.tensor.shape)}"
            )


def _write_card(plan: _Preflight, name: str, file: Path) -> None:
    """Write the card; a card that cannot be written never costs the model."""
    try:
        layout, public = plan.expansion.layout, plan.public
        origins = [public.origins[model] for model in layout.models if model in public.origins]
        facts = card.Facts(
            name=name,
            layout=layout,
            sources=[public.names[model].path for model in layout.models],
            base_models=list(dict.fromkeys(origin.path for origin in origins)),
            base_card=card.read_front_matter(plan.base.path),
            recipe=plan.recipe,
            depth=plan.base.depth,
            parameters=(
                sum(part.tensor.elements for part in plan.parts),
                sum(tensor.elements for tensor in plan.base.tensors.values()),
            ),
            identity=plan.is_identity,
            converted=plan.converts,
            fingerprint=manifest.fingerprint(layout),
        )
        file.write_text(card.write(facts), encoding="utf-8")
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights are worth more
        log.warning("the model card could not be written: %s", error)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1", "yes", "on")
