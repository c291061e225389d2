"""Expand a toy model of each type by `run`, and by mergekit from the YAML of `gen`.

Usage: zoo.py PAGE [TYPE]

Without TYPE, check every causal-LM type that transformers can build at toy size, and models of
images and text; write the table in PAGE and the `mergekit_yaml_result` of the data. With TYPE,
print the rows of that type and its variants, and write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architecture_data
import assigned
import composites
import divided_updates
import torch
import toys
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mergekit_interleave as api
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import computation, layer_names, meta_model
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.cli import main as cli
from mergekit_interleave.errors import InterleaveError, RefusedError
from mergekit_interleave.planning import mergekit_support
from mergekit_interleave.training import target as targets
from mergekit_interleave.training import write

EVERY = "interleave: every 2"
PLANS = {
    "every 2": EVERY,
    "thrice": "repeat: {layers: [3, 5], times: 3}, zero: auto",
    "one copy": "stack: [[0, 5], [4, 8]], zero: auto",
    "every 1": "interleave: every 1",
    "block": "repeat: {layers: [3, 6], as: block}, zero: auto",
    "norms": "interleave: every 2, zero: norms",
}


DAMPED = "damped"
DAMPED_LINES = ("layers: [3, 5]", "layers: [2, 6], as: block", "layers: [0, 8], as: block")
"""The repeats that are damped, in the order in which they are tried until one is not refused."""

IN_MEMORY = "in memory"
LAYOUTS = (
    EVERY,
    "stack: [[0, 3], [2, 4], [2, 4], [2, 8]]",
    "stack: [[4, 8], [0, 4], [2, 5]]",
    "drop: [2, 4]",
)
"""The layouts that are built in memory: identities, an uneven threefold repeat, a block out of
place, and layers left out. A stack of two models is added."""

STACK = "two models"
STACKS = ("a 0:5, b 3:8", "a 0:4, b 0:8", "a 0:4, b 4:8")
"""The stacks of two models, in the order in which they are tried until one is not refused."""


@dataclass(frozen=True)
class Outcome:
    """The result of expanding a type.

    Attributes:
        result: `exact`, `refused`, `wrong` or `failed`.
        detail: The engine, the reason or the error.
        hint: The hint of the error.
    """

    result: str
    detail: str
    hint: str = ""


def names() -> list[str]:
    """Return all causal-LM types in transformers, variants, and models of images and text."""
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *toys.VARIANTS} - {*composites.OWN}
    return [*sorted(causal), *composites.OWN]


def toy_config(name: str) -> Any:
    """Return the config of a toy model."""
    return composites.config(name) if name in composites.OWN else toys.config(name)


def build(name: str) -> Any:
    """Build a toy model; see `toys` and `composites`.

    Raises:
        Exception: transformers cannot build the type.
    """
    return composites.build(name) if name in composites.OWN else toys.build(name)


def save(name: str, path: Path) -> Path:
    """Save a toy checkpoint, with tensor names as in published ones."""
    build(name).save_pretrained(path)
    if name in composites.PUBLISHED:
        toy, published = composites.PUBLISHED[name]
        file = path / "model.safetensors"
        tensors = {n.replace(toy, published): t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def expand(base: Path, plan: str, out: Path) -> Outcome:
    """Expand a checkpoint with `run`, and compare the result with the checkpoint.

    Args:
        base: The checkpoint.
        plan: An identity directive.
        out: The directory of the result.
    """
    status, err = mk("run", plan, str(out), "--model", str(base))
    if status:
        error = _line(err, "error: ") or err.strip()[-200:]
        reason = error.replace(f"{base}: ", "").split("is refused: ")[-1]
        expected = "is refused: " in error or " this layout: " in error
        hint = _line(err, "hint: ").removeprefix("this would do: ")
        return Outcome("refused" if expected else "failed", reason, hint)
    difference = compare(base, out)
    if difference:
        return Outcome("wrong", difference)
    return Outcome("exact", json.loads((out / "interleave.json").read_text())["engine"])


def compare(base: Path, out: Path) -> str:
    """Describe how the outputs of two checkpoints differ; empty if they do not."""
    before, after = load(base), load(out)
    for given in _inputs(before):
        expected, found = _logits(before, given), _logits(after, given)
        difference = float((expected - found).abs().max() / expected.abs().max())
        if difference > 1e-5:
            return f"logits differ by {difference:.0e}"
    same = all(torch.equal(_text(before, cache=c), _text(after, cache=c)) for c in (True, False))
    return "" if same else "greedy text differs"


def stack(base: Path, folder: Path) -> Outcome:
    """Stack layers of a checkpoint and of a finetune of it, by `run` and by mergekit.

    Args:
        base: The checkpoint.
        folder: A directory for the finetune and the results.
    """
    other = finetune(base, folder / "finetune")
    outcome = Outcome("", "")
    for steps in STACKS:
        directive = _two_models(base, other, steps)
        tried = _stacked(directive, steps, (base, other), folder)
        if tried.result != "refused":
            return Outcome(tried.result, tried.detail, "" if steps == STACKS[0] else steps)
        outcome = outcome if outcome.result else tried
    return outcome


def finetune(base: Path, out: Path) -> Path:
    """Copy a checkpoint, with other weights."""
    shutil.copytree(base, out)
    random = torch.Generator().manual_seed(7)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.mul_(1 + torch.randn(tensor.shape, generator=random) * 0.1)
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def _stacked(directive: str, steps: str, models: tuple[Path, Path], folder: Path) -> Outcome:
    """Run a stack, and compare it with a model whose layers are assigned by hand."""
    out = folder / "stack"
    shutil.rmtree(out, ignore_errors=True)
    status, err = mk("run", directive, str(out))
    if status:
        error = (_line(err, "error: ") or err.strip()[-200:]).replace(f"{models[0]}", "a")
        expected = any(words in error for words in _REFUSALS)
        return Outcome("refused" if expected else "failed", error.split("is refused: ")[-1])
    expected = assigned.by_hand(*map(load, models), steps)
    difference = _logit_difference(expected, load(out))
    if difference:
        return Outcome("wrong", difference)
    for cache in (False, True):
        try:
            text = _text(expected, cache=cache)
        except (AssertionError, LookupError, AttributeError, RuntimeError, TypeError, ValueError):
            continue  # the class makes no cache for layers that were assigned
        if not torch.equal(text, _text(load(out), cache=cache)):
            return Outcome("wrong", "greedy text differs")
    fault = _fault_of_gen(directive, expected, folder)
    engine = json.loads((out / "interleave.json").read_text())["engine"]
    return Outcome("wrong", fault) if fault else Outcome("exact", engine)


def damped(base: Path, folder: Path) -> Outcome:
    """Compare damped repeats with a forward pass of plain ones that divides each update.

    Args:
        base: The checkpoint.
        folder: A directory for the results.

    Returns:
        `exact` if the float32 logits differ by at most 1e-5 of the largest one.
    """
    outcome = Outcome("refused", "")
    for line in DAMPED_LINES:
        out = folder / "damped"
        shutil.rmtree(out, ignore_errors=True)
        status, err = mk("run", f"repeat: {{{line}, damped: true}}", str(out), "--model", str(base))
        if not status:
            difference = _damped_difference(base, line, out)
            return Outcome("wrong", f"damped: {difference}") if difference else Outcome("exact", "")
        reason = _line(err, "error: ")  # the other plans give reasons that do not concern damping
        outcome = Outcome("refused", reason if reason.startswith("damped: ") else "")
    return outcome


def _damped_difference(base: Path, line: str, out: Path) -> str:
    """Describe how damped layers differ from layers whose updates are divided."""
    layers = json.loads((out / "interleave.json").read_text())["layers"]
    repeated = [i for i, layer in enumerate(layers) if layer["scale"] or layer.get("gain")]
    written = load(out)
    plain = api.load(f"repeat: {{{line}}}", model=base, dtype="float32")
    for given in _inputs(written):
        words = {**given, "use_cache": "mllama" in str(written.config.model_type)}
        found = _logits(written, words)
        with divided_updates.divided(plain, len(layers), repeated, 2):
            expected = _logits(plain, words)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if difference > 1e-5:
            return f"logits differ by {difference:.0e}"
    return ""


def in_memory(base: Path, folder: Path) -> Outcome:
    """Compare models that `load` builds in memory with the ones that `run` writes.

    Args:
        base: The checkpoint.
        folder: A directory for the results, with the finetune of `stack`.

    Returns:
        `exact` if the float32 logits and greedy text, with and without a cache, are equal to the
        bit for each layout that `run` writes; `refused` if it writes none.
    """
    stacks = (_two_models(base, folder / "finetune", steps) for steps in STACKS)
    compared = 0
    for layouts in (*((layout,) for layout in LAYOUTS), stacks):
        for layout in layouts:
            difference = _in_memory(base, layout, folder / "in-memory")
            if difference:
                return Outcome("wrong", f"`{layout}` in memory: {difference}")
            if difference is not None:
                compared += 1
                break
    return Outcome("exact", f"{compared} layouts") if compared else Outcome("refused", "")


def _in_memory(base: Path, layout: str, out: Path) -> str | None:
    """Describe how a model in memory differs from the written one; None if both are refused."""
    shutil.rmtree(out, ignore_errors=True)
    model = None if layout.startswith("models: ") else base
    status, err = mk("run", layout, str(out), *(() if model is None else ("--model", str(base))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            grown = api.load(layout, model=model, dtype="float32")
        except InterleaveError as error:
            return None if status and str(error) in err else f"refused: {error}"
    if status:
        return "run refuses it"
    written = load(out)
    same = _say_the_same(grown, written) or _say_the_same(*map(aligned, (grown, written)))
    return "" if same else "outputs differ"


def _say_the_same(*models: Any) -> bool:
    """Whether the outputs of two models are equal to the bit."""
    return all(torch.equal(one, other) for one, other in zip(*map(outputs, models), strict=True))


def aligned(model: Any) -> Any:
    """Move the parameters of a model to new memory, and return the model.

    Mapped tensors start anywhere in a file, and the rounding of some kernels depends on that.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def _two_models(base: Path, other: Path, steps: str) -> str:
    """Return the directive that stacks layers of two models."""
    return f"models: {{a: {base}, b: {other}}}, layout: [{steps}]"


_REFUSALS = ("is refused: ", " this layout: ", " cannot be made from several models")
"""Parts of the errors of stacks that no config.json can represent."""


def _fault_of_gen(directive: str, expected: Any, folder: Path) -> str:
    """Describe what is wrong with a stack by mergekit-yaml from an accepted recipe."""
    status, err, recipe = mk_out("gen", directive)
    if status:
        return ""
    out, file = folder / "stack-by-mergekit", folder / "stack.yml"
    shutil.rmtree(out, ignore_errors=True)
    file.write_text(recipe)
    _merge(recipe, out)
    if "fix-config" in err:
        mk("fix-config", str(out), "--recipe", str(file))
    try:
        difference = _logit_difference(expected, load(out))
    except Exception as error:  # noqa: BLE001 - the table shows it
        difference = str(error)[:80]
    return f"gen: {difference}" if difference else ""


def _logit_difference(expected: Any, found: Any) -> str:
    """Describe how the logits of two models differ on text; empty if they do not."""
    cache = "mllama" in str(found.config.model_type)  # which cannot do without one
    given = {"input_ids": toys.tokens(), "use_cache": cache}
    one, other = _logits(expected, given), _logits(found, given)
    difference = float((one - other).abs().max() / one.abs().max())
    return f"logits differ by {difference:.0e}" if difference > 1e-5 else ""


def in_vain(base: Path, out: Path) -> list[str]:
    """List the tensors that are zeroed needlessly in all new layers, or that get no gradient there.

    Args:
        base: The checkpoint.
        out: The expanded checkpoint.
    """
    model, layers = load(out), json.loads((out / "interleave.json").read_text())["layers"]
    source, given = load(base).state_dict(), {"input_ids": toys.tokens()}
    has_gradients = _backward(model)
    expected = _logits(model, given)
    useful: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        origin = _origin(name, layers)
        before = source.get(origin or "", parameter)
        if parameter.any() or before.shape != parameter.shape or not before.any():
            continue
        if (
            "encoder_attn" in name or "cross_attn" in name
        ):  # without an encoder's output, it is unused
            continue
        with torch.no_grad():
            parameter.copy_(before)
            needed = not torch.equal(expected, _logits(model, given))
            parameter.zero_()
        trained = not has_gradients or (parameter.grad is not None and bool(parameter.grad.any()))
        tensor = re.sub(r"\.\d+\.", ".", name, count=1)
        useful[tensor] = useful.get(tensor, False) or (needed and trained)
    return [tensor for tensor, is_useful in useful.items() if not is_useful]


def _backward(model: Any) -> bool:
    """Whether a backward pass works.

    Some types change their weights in place outside training, so training mode is tried as well.
    """
    for training in (False, True):
        with contextlib.suppress(Exception):
            model.train(training)
            for given in _inputs(model):
                model(**given).logits.square().sum().backward()
            model.eval()
            return True
        model.zero_grad()
    model.eval()
    return False


def outputs(model: Any) -> list[torch.Tensor]:
    """Return the logits of a toy, and its greedy text with and without a cache."""
    logits = [_logits(model, given) for given in _inputs(model)]
    return [*logits, *(_text(model, cache=cache) for cache in (True, False))]


def _inputs(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return text, and text with an image if the model takes images."""
    picture = composites.with_an_image(model) if hasattr(model.config, "vision_config") else None
    return [{"input_ids": toys.tokens()}, *([picture] if picture else [])]


def _origin(name: str, layers: list[dict[str, Any]]) -> str | None:
    """Return the name in the base of the tensor that a new layer's tensor was copied from."""
    match = re.match(r"([^\d]+?)\.(\d+)\.(.+)", name)
    if match is None or int(match[2]) >= len(layers) or not layers[int(match[2])]["new"]:
        return None
    return f"{match[1]}.{layers[int(match[2])]['layer']}.{match[3]}"


def ends(name: str) -> dict[str, list[str]]:
    """Find the tensors that a type uses before its layers, and those that it uses after them.

    Raises:
        RefusedError: The type cannot be run without weights.
    """
    config, is_composite = toy_config(name), name in composites.OWN
    family = families.family_of_config(config.to_dict())
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False  # else the head has no tensor of its own
    make = AutoModelForCausalLM.from_config
    if is_composite:
        model_class = composites.class_of(name)
        config.architectures, make = [model_class.__name__], model_class
    with torch.device("meta"):
        model = make(config)
    found = computation.record(config, toys.DEPTH)
    stored = meta_model.stored_names(model)
    stacks = layer_names.stacks_of(stored.values(), toys.DEPTH, config.to_dict())
    stack = family.layer_prefix if family.layer_prefix in stacks else stacks[0]
    root, own = f"{stack.rpartition('.')[0]}.", f"{family.layer_prefix.rpartition('.')[0]}."
    embeddings = model.get_input_embeddings().weight
    named = sorted(found.first_use, key=lambda n: model.get_parameter(n) is not embeddings)
    return {
        key: list(
            dict.fromkeys(
                re.sub(f"^{re.escape(root)}", own, stored[n]).removeprefix("language_model.")
                for n in named
                if found.first_use[n] == use
            )
        )
        for key, use in (("before_layers", -1), ("after_layers", 1))
    }


def defined_by_mergekit(model_type: str, after_layers: Iterable[str]) -> bool:
    """Whether mergekit has a definition of a type that lists the tensors after its layers."""
    from mergekit.architecture import NAME_TO_ARCH

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    of_type = [
        one
        for some in NAME_TO_ARCH.values()
        for one in some
        if one.expected_model_type == model_type
    ]
    found = NAME_TO_ARCH.get(model_class) or of_type
    chosen = [one for one in found if len(found) == 1 or one.expected_model_type == model_type]
    listed = {
        name
        for one in chosen[:1]
        for module in one.modules.values()
        for weight in module.architecture.definition.post_weights
        for name in (weight.name, *(weight.aliases or ()))
    }
    needed = {*after_layers} - {"lm_head.weight"}  # the head may be tied
    return bool(needed) and needed <= listed


def mergekit_result(base: Path, plan: str, folder: Path) -> families.MergekitResult:
    """Measure what plain `mergekit-yaml` writes for the recipe; try `fix-config` if it is wrong."""
    with gen_allowed():
        status, _, recipe = mk_out("gen", plan, "--model", str(base))
    if status:
        return families.WRONG_TENSORS
    out, file = folder / "mergekit", folder / "recipe.yml"
    file.write_text(recipe)
    _merge(recipe, out)
    with contextlib.suppress(Exception):
        if not compare(base, out):
            return families.EXACT
    status, _ = mk("fix-config", str(out), "--recipe", str(file))
    with contextlib.suppress(Exception):
        if not status and not compare(base, out):
            return families.BROKEN_CONFIG
    return families.WRONG_TENSORS


def _merge(recipe: str, out: Path) -> None:
    """Run `mergekit-yaml`, which may fail."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
        config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
        run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False))


@contextlib.contextmanager
def gen_allowed() -> Iterator[None]:
    """Let `gen` write recipes that the data says mergekit cannot follow, to measure them."""
    check, mergekit_support.check = mergekit_support.check, lambda *_: ()
    try:
        yield
    finally:
        mergekit_support.check = check


def mk(*words: str) -> tuple[int, str]:
    """Run mk-interleave in this process; return its status and its standard error."""
    status, err, _ = mk_out(*words)
    return status, err


def mk_out(*words: str) -> tuple[int, str, str]:
    """Run mk-interleave in this process; return its status and both outputs."""
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            cli.main([*words])
        except SystemExit as error:
            return int(error.code or 0), err.getvalue(), out.getvalue()
    return 0, err.getvalue(), out.getvalue()


def _line(text: str, start: str) -> str:
    lines = (line for line in text.splitlines() if line.startswith(start))
    return next(lines, "").removeprefix(start)


def load(path: Path) -> Any:
    """Load a model with the class that saved it; no tensor may be missing or left over."""
    architectures = json.loads((path / "config.json").read_text()).get("architectures") or [""]
    model_class = getattr(transformers, architectures[0], None) or AutoModelForCausalLM
    model, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise AssertionError(f"{info['missing_keys']} {info['unexpected_keys']}")
    return model.eval()


def _logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**given).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return logits


def _text(model: Any, *, cache: bool) -> torch.Tensor:
    """Generate greedy text."""
    text: torch.Tensor = model.generate(
        toys.tokens()[:1, : toys.TOKENS // 2],
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        use_cache=cache,
    )
    return text


def quiet() -> None:
    """Turn off the messages and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Row:
    """The results of one type.

    Attributes:
        name: The name of the type or variant.
        outcomes: The result of each plan.
        mergekit: The result of plain `mergekit-yaml` for the first exact plan.
        nearby: The result of the directive that is suggested instead of a refused one.
        ends: The tensors before and after the layers; see `ends`.
    """

    name: str
    outcomes: dict[str, Outcome]
    mergekit: str
    nearby: Outcome
    ends: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether the first plan is exact."""
        return self.outcomes["every 2"].result == "exact"

    def __str__(self) -> str:
        """Return the row of the table."""
        cells = [self.name]
        for plan in (*PLANS, STACK, IN_MEMORY, DAMPED):
            outcome = self.outcomes.get(plan)
            cells.append(outcome.result if outcome else "-")
            if plan == STACK and outcome and outcome.result == "exact" and outcome.hint:
                cells[-1] += f" (`{outcome.hint}`)"
        inexact = [o for o in self.outcomes.values() if o.result != "exact" and o.detail]
        engine = next((o.detail for o in self.outcomes.values() if o.result == "exact"), "-")
        suggested = next((o.hint for o in inexact if o.hint), "")
        distinct = {re.sub(r"\d+", "N", o.detail): o.detail for o in reversed(inexact)}
        reasons = [text.split(" this layout: ")[-1] for text in reversed(distinct.values())]
        works = suggested and self.nearby.result == "exact"
        reasons += [f"`{suggested}` works"] if works else []
        cells += [engine, self.mergekit or "-", "; ".join(reasons)]
        return f"| {' | '.join(cells)} |"


def examine(name: str, folder: Path) -> Row:
    """Expand a type by each plan.

    Args:
        name: The type; see `names`.
        folder: A directory for the checkpoints.

    Raises:
        Exception: transformers cannot build the type.
    """
    base = save(name, folder / "base")
    _logits(load(base), {"input_ids": toys.tokens()})
    family = families.family_of_config(json.loads((base / "config.json").read_text()))
    row = Row(name, {}, "", Outcome("", ""))
    measured: dict[str, list[str]] = {}
    is_type = name not in composites.OWN and ":" not in name
    if is_type and family is not None and not family.refused:
        with contextlib.suppress(RefusedError):
            measured = ends(name)
    for plan, directive in PLANS.items():
        if plan == "norms" and (family is None or family.output_norms is None):
            continue
        out = folder / "out"
        try:
            outcome = expand(base, directive, out)
            fault = ""
            if outcome.result == "exact" and plan == "every 2":
                fault = _fault(base, out, folder / "again", outcome.detail)
            if outcome.result == "exact" and plan == "norms":
                fault = untrainable(out)
            outcome = Outcome("wrong", fault) if fault else outcome
        except Exception as error:  # noqa: BLE001 - the table shows it
            outcome = Outcome("failed", f"{type(error).__name__}: {error}"[:120])
        shutil.rmtree(out, ignore_errors=True)
        row.outcomes[plan] = outcome
    exact = [PLANS[plan] for plan, outcome in row.outcomes.items() if outcome.result == "exact"]
    hints = [outcome.hint for outcome in row.outcomes.values() if outcome.hint]
    for column, check in ((STACK, stack), (IN_MEMORY, in_memory), (DAMPED, damped)):
        try:
            row.outcomes[column] = check(base, folder)
        except Exception as error:  # noqa: BLE001 - the table shows it
            row.outcomes[column] = Outcome("failed", f"{type(error).__name__}: {error}"[:120])
    nearby = expand(base, hints[0], folder / "nearby") if hints else Outcome("", "")
    exact += hints[:1] if nearby.result == "exact" else []
    by_mergekit = mergekit_result(base, exact[0], folder) if exact else ""
    return Row(name, row.outcomes, by_mergekit, nearby, measured)


def _fault(base: Path, out: Path, again: Path, engine: str) -> str:
    """Describe what else is wrong with an exact expansion; empty if nothing is."""
    needless = in_vain(base, out)
    if needless:
        return f"zeroed needlessly: {needless[0]}"
    if engine == "mergekit" and not engines_agree(base, out, again):
        return "the engines' tensors differ"
    fault = untrainable(out)
    if fault:
        return f"train: {fault}"
    for words in ((), ("--against", str(base), "--forward")):
        status, err = mk("verify", str(out), *words)
        if status:
            return f"verify: {_line(err, 'error: ')}"
    return ""


def untrainable(out: Path) -> str:
    """Describe what is wrong with the settings for training the new layers; empty if nothing is.

    The settings for transformers and PEFT are run as `train` prints them.
    """
    try:
        target = targets.read(out, Models())
    except RefusedError as error:
        return "" if _is_shared(load(out)) else str(error)
    fault = _frozen_otherwise(out, target)
    if fault:
        return fault
    for name in ("transformers", "peft"):
        model = _model_of(write.write(target, name).text)
        inner = getattr(model, "get_base_model", lambda whole=model: whole)()
        new = {*target.layers}
        layers_of = _layers(inner, target.depth)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        layers = {index for parameter in trained for index in layers_of.get(parameter, [-1])}
        if layers != new:
            return f"{name}: trains layers {sorted(layers)}, not {sorted(new)}"
        in_new_layers = {parameter for parameter, indices in layers_of.items() if indices <= new}
        if name == "transformers" and trained != in_new_layers:
            return f"{name}: does not train every parameter of the new layers"
        if _backward(model):
            parameters = [p for p in model.parameters() if p.grad is not None and p.grad.any()]
            with_gradient = {index for p in parameters for index in layers_of[id(p)]}
            if with_gradient != new:
                return f"{name}: layers {sorted(new - with_gradient)} get no gradient"
    return ""


def _frozen_otherwise(out: Path, target: Any) -> str:
    """Describe how the card's lines of plain PyTorch train other parameters; empty if they do not.

    A card may have no such lines.
    """
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    for code in (block for block in blocks if block.startswith("import re")):
        model = load(out)
        exec(code, {"model": model})  # noqa: S102 - the card tells users to run it
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        if trained != {name for name, _ in model.named_parameters()} & target.trained:
            return f"the card's lines train {sorted(trained ^ target.trained)[:1]}"
    return ""


def _layers(model: Any, depth: int) -> dict[int, set[int]]:
    """Map the id of each parameter to the layers whose modules contain it."""
    layers_of: dict[int, set[int]] = {}
    for layers in assigned.layer_lists(model, depth):
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                layers_of.setdefault(id(parameter), set()).add(index)
    return layers_of


def _is_shared(model: Any) -> bool:
    """Whether layers share parameters."""
    depth = model.config.get_text_config().num_hidden_layers
    return any(len(layers) > 1 for layers in _layers(model, depth).values())


def _model_of(code: str) -> Any:
    """Run Python code that creates a model, and return the model in float32 for evaluation."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)  # noqa: S102 - `train` tells users to run it
    return names["model"].float().eval()


def engines_agree(base: Path, out: Path, again: Path) -> bool:
    """Whether the stream engine writes the tensors that mergekit wrote."""
    words = ("run", EVERY, str(again), "--model", str(base), "--engine", "stream", "--no-verify")
    status, _ = mk(*words)
    if status:
        return False
    stream, mergekit = (
        {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
        for path in (again, out)
    )
    return stream.keys() == mergekit.keys() and all(
        torch.equal(stream[name], mergekit[name]) for name in stream
    )


def main() -> int:
    """Check one type or all; return 1 if a result is neither exact nor refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="the file for the table")
    parser.add_argument("type", nargs="?", default="", help="check only this type")
    arguments = parser.parse_args()
    faults = architecture_data.problems(json.loads(families.DATA.read_text(encoding="utf-8")))
    if faults:
        print(*faults, sep="\n")
        return 1
    return check_one(arguments.type) if arguments.type else check_all(arguments.page)


def check_one(model_type: str) -> int:
    """Print the rows of a type and its variants.

    Args:
        model_type: The type, or one variant: `type:variant`.
    """
    quiet()
    chosen = [name for name in names() if model_type in (name, name.partition(":")[0])]
    if not chosen:
        close = difflib.get_close_matches(model_type, names())
        print(f"transformers {transformers.__version__} has no causal LM of type {model_type!r}")
        print(f"similar names: {', '.join(close)}" if close else "no name is similar")
        return 1
    print(_head())
    examined = [_examined(name) for name in chosen]
    for row in examined:
        print(row, flush=True)
    rows = [row for row in examined if isinstance(row, Row)]
    for row in rows:
        recorded = _recorded(row.name)
        if row.mergekit and recorded and row.mergekit != recorded:
            print(
                f'the data has "{recorded}" for {row.name}, but this run measured '
                f'"{row.mergekit}": change "mergekit_yaml_result" in its entry'
            )
    return 1 if len(rows) < len(examined) or _has_faults(rows) else 0


def _recorded(name: str) -> str | None:
    """Return the recorded `mergekit_yaml_result` of a type; None for a variant, which has none."""
    if ":" in name:
        return None
    data = json.loads(families.DATA.read_text(encoding="utf-8"))
    entry = data["composites"].get(name) or data["families"].get(name) or {}
    return str(entry.get("mergekit_yaml_result", families.WRONG_TENSORS))


def check_all(page: Path) -> int:
    """Check every type, and write the table and mergekit's results."""
    rows, unbuilt = [], []
    with ProcessPoolExecutor(initializer=quiet) as pool:
        for row in pool.map(_examined, names()):
            print(row, flush=True)
            if isinstance(row, Row):
                rows.append(row)
            else:
                unbuilt.append(row)
    fill_in(rows)
    page.parent.mkdir(exist_ok=True)
    values = {
        "version": transformers.__version__,
        "count": len(rows),
        "exact": sum(row.is_exact for row in rows),
        "plans": "\n".join(f"- {name}: `{plan}`" for name, plan in PLANS.items()),
        "stack": STACK,
        "steps": STACKS[0],
        "others": " and ".join(f"`{steps}`" for steps in STACKS[1:]),
        "in_memory": IN_MEMORY,
        "damped": DAMPED,
        "damped_line": DAMPED_LINES[0],
        "divided": sum(row.outcomes[DAMPED].result == "exact" for row in rows),
        "layouts": ", ".join(f"`{layout}`" for layout in LAYOUTS),
        "shared": sum(row.outcomes[IN_MEMORY].result == "exact" for row in rows),
        "stacked": sum(row.outcomes[STACK].result == "exact" for row in rows),
        "head": _head(),
        "rows": "\n".join(map(str, rows)),
        "unbuilt": "\n".join(unbuilt),
    }
    page.write_text(_PAGE.format(**values), encoding="utf-8")
    return 1 if _has_faults(rows) else 0


def _head() -> str:
    """Return the first two lines of the table."""
    columns = ["type", *PLANS, STACK, IN_MEMORY, DAMPED, "engine", "mergekit-yaml", "why refused"]
    return f"| {' | '.join(columns)} |\n| {' | '.join('---' for _ in columns)} |"


def _has_faults(rows: list[Row]) -> bool:
    """Whether a result is neither exact nor refused."""
    results = {outcome.result for row in rows for outcome in row.outcomes.values()}
    results |= {row.nearby.result for row in rows}
    return bool(results - {"exact", "refused", ""})


def _examined(name: str) -> Row | str:
    """Return the row of a type, or a row with the reason why it cannot be built."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return examine(name, Path(folder))
        except Exception as error:  # noqa: BLE001 - any error is the reason
            reason = " ".join(str(error).split())[:100].replace("|", "/")
            return f"| {name} | {type(error).__name__}: {reason} |"


def fill_in(rows: Iterable[Row]) -> None:
    """Write what was measured of each type into the data file, one line per type."""
    file = families.DATA
    data = json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        for section in ("composites", "families"):
            entry = data[section].get(row.name)
            if entry is not None:
                entry |= {"mergekit_yaml_result": row.mergekit} if row.mergekit else {}
                entry |= row.ends
    file.write_text(lines(data), encoding="utf-8")


def lines(data: dict[str, Any]) -> str:
    """Return the text of the data file: one line for each entry."""
    parts = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            entries = (f"    {json.dumps(n)}: {json.dumps(entry)}" for n, entry in value.items())
            text = "{\n" + ",\n".join(entries) + "\n  }"
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


_PAGE = """# Architectures

This page shows what `mk-interleave run` does with each model type that transformers {version}
builds at toy size: {count} types and variants. {exact} of them are exact if every second layer is
copied. The plans are:

{plans}
- {stack}: `layout: [{steps}]` of the model and a finetune of it, which has the same config
  and other weights; {others} if no config.json can represent that
- {in_memory}: what `mergekit_interleave.load` builds without a file, for {layouts} and the stack of
  two models

- {damped}: `repeat: {{{damped_line}, damped: true}}`, or a longer block if no config.json can
  represent that

{divided} damped repeats are exact: the float32 logits differ by at most 1e-5 of the largest logit
from those of a plain repeat whose forward pass halves each addition to the residual stream.

{stacked} stacks of two models are exact: the float32 logits and the greedy text are those of a
model whose layers were assigned by hand in Python. Where `gen` accepts the directive,
mergekit-yaml (and `fix-config`) wrote the same.

{shared} types are exact in memory: for each of the five layouts that `run` writes, `load` builds a
model whose float32 logits and greedy text, with and without the cache, equal those of the written
model to the bit, if both have their weights at equally aligned addresses. It refuses the others
with the same error.

*Exact* means that the float32 logits differ from the base's by at most 1e-5 of the largest logit,
on more tokens than any window or indexer covers; that greedy text is the same with and without the
cache; and that each zeroed tensor gets a gradient, and would change the logits if it kept its
values. *Refused* means that `run` stops before it writes a byte. A dash means that the plan does
not apply to the type.

The engine is mergekit if it writes the right tensors, and the stream engine otherwise. The next
column shows what plain `mergekit-yaml` writes from the YAML of `gen`: `exact` models; `config`, a
wrong config.json that `fix-config` repairs; or `tensors`, which are wrong or missing, so `gen`
refuses the type. The last column says why a plan was refused, and which directive works instead if
there is one. `type:variant` is a type with other settings. `make zoo` writes this page.

{head}
{rows}

## Not built

These types are not checked, because generic settings do not build toy models of them.

| type | why |
| --- | --- |
{unbuilt}
"""


if __name__ == "__main__":
    sys.exit(main())
