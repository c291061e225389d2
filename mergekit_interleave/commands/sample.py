"""`sample`: let the base and grown models speak side by side, with nothing written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_interleave._files import read_text
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.meta_model import hide_bars, memory_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import DirectiveLike, StrPath, Text
from mergekit_interleave.commands.load import built, named, planned
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.engines.protocol import Bar, no_bar
from mergekit_interleave.errors import CheckpointError, DirectiveError, collected_warnings
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.virtual import sampling, sources
from mergekit_interleave.virtual.model import memory_of
from mergekit_interleave.virtual.sampling import Continuation, Perplexity, Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_interleave.commands.inputs import Words

BASE = "base"


@dataclass(frozen=True)
class ModelSample:
    """What one model said.

    Attributes:
        name: `base`, or the directive.
        layers: The number of layers.
        continuations: What it wrote after each prompt.
        perplexity: Its perplexity on the text; None without a text.
        nbytes: The bytes of its weights that no model before it in the report has in memory.
    """

    name: str
    layers: int
    continuations: tuple[Continuation, ...]
    perplexity: Perplexity | None
    nbytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of generation, prompts included; None without a prompt."""
        seconds = sum(each.seconds for each in self.continuations)
        return sum(each.tokens for each in self.continuations) / seconds if seconds else None


@dataclass(frozen=True)
class SampleReport:
    """What the base and the grown models said.

    Attributes:
        models: The base, and then the models of the directives in order.
        warnings: Warnings, one sentence each.
    """

    models: tuple[ModelSample, ...]
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return list(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `sample --json` prints it."""
        return {
            "models": [
                {
                    "name": each.name,
                    "layers": each.layers,
                    "continuations": [dataclasses.asdict(one) for one in each.continuations],
                    "perplexity": each.perplexity and each.perplexity.as_dict(),
                    "tokens_per_second": each.tokens_per_second,
                    "bytes": each.nbytes,
                }
                for each in self.models
            ],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())


def sample(  # noqa: PLR0913 - one parameter for each option
    *wanted: DirectiveLike | None,
    prompt: str | Sequence[str] = (),
    text: StrPath | None = None,
    chat: bool = False,
    max_new_tokens: int | str = 64,
    seed: int | str = 0,
    temperature: float | str = 0.0,
    base: Any = None,
    allow_non_identity: bool = False,
    trust_remote_code: bool = False,
    progress: Bar | None = None,
    **words: Unpack[Words],
) -> SampleReport:
    """Let the base and the models of some directives continue prompts, with nothing written.

    The base is loaded once, and the models share its tensors.

    Args:
        wanted: Text, a path, an open file, a mapping, or a `Directive` each. A file may have
            one directive per line.
        prompt: What each model continues: one prompt or several.
        text: A file with text on which the perplexity is measured.
        chat: Apply the chat template to each prompt.
        max_new_tokens: The maximum number of tokens that follow a prompt.
        seed: The seed of the random numbers.
        temperature: The temperature; 0 takes the most likely token.
        base: The base, if transformers has loaded it already.
        allow_non_identity: Accept a `zero` list with which the new layers are not identities.
        trust_remote_code: Run code from the models. By default none is run.
        progress: As for `run`; it counts forward passes and new tokens.
        words: Keywords that take precedence over the directives; see `Words`.

    Raises:
        InterleaveError: A directive is invalid or refused, or there is nothing to say.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    how = Sampling(
        inputs.parse_count(max_new_tokens, "--max-new-tokens"),
        inputs.parse_number(temperature, "--temperature", float),
        inputs.parse_number(seed, "--seed", int),
        chat,
    )
    _check(prompts, text, how)
    read = [*_read(wanted)]
    _check_flags(read, words)
    parsed = [named(inputs.parse(each, words), base) for each in read]
    with (
        restored_settings(),
        collected_warnings() as warnings,
        memory_errors(),
        scratch_directory() as scratch,
    ):
        opened = Models(trust_remote_code=trust_remote_code, dequantize_into=scratch)
        plans = [
            planned(each, opened, allow_non_identity=allow_non_identity, warn=warnings.append)
            for each in parsed
        ]
        first, dtype = _sole_base(plans), _sole_dtype(plans)
        hide_bars()
        tokenizer = tokenizer_of(first)
        script = _Script(tokenizer, how, prompts, _tokens(tokenizer, text), progress or no_bar)
        if base is None:
            base = sources.load_source(first, dtype or "auto", None)
        else:
            sources.source_of(base, {first.ref: first})
        sampling.check_predicts(base)
        models = [script.read_by(BASE, base, first.depth, memory_of(base))]
        known = set(memory_of(base))
        for given, directive, plan in zip(read, parsed, plans, strict=True):
            grown = built(plan, {plan.first.ref: base}, warn=warnings.append)
            memory = memory_of(grown)
            own = {place: size for place, size in memory.items() if place not in known}
            name = _named(given, directive, words)
            models.append(script.read_by(name, grown, len(plan.layout), own))
            del grown
    return SampleReport(tuple(models), tuple(dict.fromkeys(warnings)))


def _sole_base(plans: Sequence[ExpansionPlan]) -> Checkpoint:
    """Return the model of the first layer, which must be the same in all plans.

    Raises:
        DirectiveError: It is not.
    """
    first, *others = (plan.first for plan in plans)
    for other in others:
        if other.ref.identity != first.ref.identity:
            raise DirectiveError(
                f"the directives grow different models: {first.ref} and {other.ref}",
                hint="call `sample` once for each model",
            )
    return first


def _sole_dtype(plans: Sequence[ExpansionPlan]) -> str | None:
    """Return the dtype that all directives convert the models to; None if they convert nothing.

    Raises:
        DirectiveError: They convert them to different ones.
    """
    first, *others = dict.fromkeys(mergekit_yaml.dtype_of(plan.mergekit) for plan in plans)
    if others:
        raise DirectiveError(
            f"the directives convert the models to different dtypes: {first or 'none'} and "
            f"{others[0] or 'none'}",
            hint="call `sample` once for each dtype",
        )
    return first


def _check_flags(read: Sequence[Directive | Text | None], words: Words) -> None:
    """Check that no growth flag replaces the growth lines of several directives.

    Raises:
        DirectiveError: One does, so that all directives would be the same.
    """
    if len(read) > 1 and inputs.parse(None, words).growth is not None:
        raise DirectiveError(
            "a growth flag replaces the growth line of a directive, and there are several",
            hint="pass each layout as a directive of its own, such as 'interleave: every 4'",
        )


def _check(prompts: Sequence[str], text: StrPath | None, how: Sampling) -> None:
    """Check the options that need no model.

    Raises:
        DirectiveError: One of them is invalid.
    """
    if not prompts and text is None:
        raise DirectiveError(
            "there is nothing to say: neither a prompt nor a text is given",
            hint="pass --prompt 'Once upon a time', or --text FILE for perplexity",
        )
    if not prompts and (how.chat or how.temperature):
        option = "--chat" if how.chat else "--temperature"
        raise DirectiveError(f"{option} has no effect without a prompt", hint="pass --prompt TEXT")
    if how.temperature and not _LEAST_TEMPERATURE <= how.temperature < math.inf:
        least = f"{_LEAST_TEMPERATURE:g}"
        raise DirectiveError(f"--temperature is {how.temperature:g}, not 0 or at least {least}")
    if not 0 <= how.seed < _SEEDS:
        raise DirectiveError(f"--seed is {how.seed}, not a whole number from 0 to 2**64-1")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DirectiveError(f"the prompt {prompt!r:.60} is not text")
        if not prompt.strip():
            raise DirectiveError(
                "the prompt is empty", hint="pass one, such as --prompt 'Once upon a time'"
            )


_LEAST_TEMPERATURE = 0.01
"""Logits that are divided by less may overflow."""

_SEEDS = 2**64


def _read(wanted: Sequence[DirectiveLike | None]) -> Iterator[Directive | Text | None]:
    """Yield each directive; a file may have one per line."""
    if not wanted:
        yield None
    for each in wanted:
        found = inputs.read(each)
        lines = inputs.lines(found.text, found.where) if isinstance(found, Text) else []
        if sum(_is_whole(line.text) for line in lines) > 1:
            yield from lines
        else:
            yield found


def _is_whole(line: str) -> bool:
    """Whether a line is a directive with a growth line of its own."""
    try:
        return not line[0].isspace() and directives.parse(line, line).growth is not None
    except DirectiveError:
        return False


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a model.

    Raises:
        CheckpointError: It has none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(
            str(checkpoint.path), trust_remote_code=checkpoint.trusted
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint.ref}: its tokenizer cannot be loaded: {reason}",
            hint="add the files of its tokenizer to the directory of the model",
        ) from error


def _tokens(tokenizer: Any, text: StrPath | None) -> Any:
    """Return the tokens of a text file; None without a file.

    Raises:
        DirectiveError: It cannot be read, or is too short.
    """
    if text is None:
        return None
    return sampling.encode_text(tokenizer, read_text(Path(text)), str(text))


@dataclass(frozen=True)
class _Script:
    """What every model is asked.

    Attributes:
        tokenizer: The tokenizer of the base.
        how: How the models continue prompts.
        prompts: The prompts.
        tokens: The tokens of the text; None without a text.
        bar: Shows the progress, as for `run`.
    """

    tokenizer: Any
    how: Sampling
    prompts: Sequence[str]
    tokens: Any
    bar: Bar

    def read_by(self, name: str, model: Any, layers: int, memory: Mapping[int, int]) -> ModelSample:
        """Ask a model.

        Args:
            name: The name of the model in the report.
            model: The model.
            layers: Its number of layers.
            memory: The sizes of its own tensors in bytes, by address.
        """
        text = 0 if self.tokens is None else self.tokens.shape[1] - 1
        total = text + self.how.new_tokens * len(self.prompts)
        with self.bar(total) as tick, sampling.evaluating(model):
            found = None if self.tokens is None else sampling.perplexity(model, self.tokens, tick)
            continuations = []
            for prompt in self.prompts:
                continuations.append(sampling.continuation(model, self.tokenizer, prompt, self.how))
                tick(self.how.new_tokens)
        return ModelSample(name, layers, tuple(continuations), found, sum(memory.values()))


def _named(given: Directive | Text | None, directive: Directive, words: Words) -> str:
    """Return a directive in one line: as it was given, or without its model if flags changed it."""
    changed = any(value is not None for word, value in words.items() if word != "model")
    if isinstance(given, Text) and not changed and len(given.text.strip().splitlines()) == 1:
        return given.text.strip()
    return yaml_io.write_inline(dataclasses.replace(directive, model=None).to_document())


def _lines(report: SampleReport) -> Iterator[str]:
    for number, first in enumerate(report.models[0].continuations):
        yield f"prompt: {first.prompt}"
        for model in report.models:
            yield f"--- {model.name}, {model.layers} layers"
            yield from model.continuations[number].text.strip("\n").splitlines() or [""]
        yield ""
    yield from _table(report)


def _table(report: SampleReport) -> Iterator[str]:
    """Yield the numbers of all models in aligned columns; the names may be long, so they end it."""
    scored = report.models[0].perplexity
    head = ["layers"]
    head += [] if scored is None else [f"perplexity ({sampling.tokens_of(scored.tokens)})"]
    head += ["tokens/s"] if report.models[0].continuations else []
    rows = [[*head, "own weights", "model"]]
    for model in report.models:
        row = [str(model.layers)]
        row += [] if model.perplexity is None else [f"{model.perplexity.value:.3f}"]
        row += [] if model.tokens_per_second is None else [f"{model.tokens_per_second:.1f}"]
        rows.append([*row, amount(model.nbytes), model.name])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *numbers, name in rows:
        cells = (cell.rjust(width) for cell, width in zip(numbers, widths, strict=False))
        yield "  ".join([*cells, name])
