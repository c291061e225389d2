"""Compare the forward passes of a model and its base, which are loaded one after the other.

Both run in float32 on a text and on seeded random tokens. The number of random tokens exceeds the
longest sliding window.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_interleave import _dtypes
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.safetensors_header import iterate_tensors, read_json
from mergekit_interleave.directive.model_ref import ModelPath
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.output.verification_text import MOST_DIFFERENT

TEXT = """\
Every spring the river rose above the lower meadow, and the farmer moved the cattle to the hill.
His daughter kept a small book in which she wrote the day, the height of the water on the old stone
post, and the wind. After eleven years she could say, a week before, how high it would come. "It is
not a gift," she told the neighbours. "I only write down what happens, and look at it again." In the
twelfth year a man from the city came with instruments in a wooden case. He measured the rain and
the snow in the mountains, and his numbers were good, but hers were better, because the post had
stood in the water longer than any instrument. They compared their tables until evening. Then they
agreed that both should go on, and that each should send the other a letter on the first of May.
"""

_MAX_LOSS = 700.0
"""The largest loss whose exponential does not overflow."""

_TOKENS = 64
"""The number of random tokens beyond the longest window, and of last tokens that are compared."""

_NEW_TOKENS = 16
"""The number of tokens that each model generates."""

_MAX_TOKENS = 2**13
"""The maximum number of random tokens, even if a window is longer: more would take hours."""

_WINDOWS = (
    "sliding_window", "attention_window_size", "window_size", "attention_chunk_size",
    "local_attention", "index_topk",
)  # fmt: skip
"""The config keys for the number of tokens that a layer attends to, or selects from."""


@dataclass(frozen=True)
class ForwardComparison:
    """The result of comparing the forward passes of a model and its base.

    Attributes:
        tokens: The number of random tokens.
        window: The longest window of a layer; 0 if there is none.
        text: The number of tokens of the text; 0 if there is no tokenizer.
        new_tokens: The number of tokens that each model generated; 0 if the type cannot generate.
        difference: The largest difference between two logits.
        size: The largest logit of the base.
        same_tokens: Whether both generated the same tokens.
        perplexity: The perplexities of the base and of the model on the text; None if they cannot
            be computed.
        offloaded: Whether weights stayed on disk.
    """

    tokens: int
    window: int
    text: int
    new_tokens: int
    difference: float
    size: float
    same_tokens: bool
    perplexity: tuple[float, float] | None
    offloaded: bool

    @property
    def is_exact(self) -> bool:
        """Whether the model computes what its base computes."""
        return self.relative <= MOST_DIFFERENT and self.same_tokens

    @property
    def relative(self) -> float:
        """The difference relative to the largest logit."""
        return self.difference / self.size if self.size else self.difference

    def outcome(self, *, identity: bool) -> dict[str, Any]:
        """Return the result as interleave.json stores it.

        Args:
            identity: Whether the model must compute what its base computes.
        """
        found: dict[str, Any] = {"exact": self.is_exact} if identity else {}
        found |= {
            "largest_difference": self.difference,
            "largest_logit": self.size,
            "dtype": "float32",
            "random_tokens": self.tokens,
            "window": self.window,
            "text_tokens": self.text,
        }
        if self.new_tokens:
            found |= {"greedy_tokens": self.new_tokens, "same_greedy_tokens": self.same_tokens}
        if self.perplexity is not None:
            found |= dict(zip(("base_perplexity", "perplexity"), self.perplexity, strict=True))
        found |= {"offloaded": True} if self.offloaded else {}
        names = ("torch", "transformers")
        return found | {"tools": {name: metadata.version(name) for name in names}}


def compare(
    base: Path,
    out: Path,
    *,
    lora: ModelPath | None = None,
    trust_remote_code: bool = False,
    max_memory: int | None = None,
) -> ForwardComparison:
    """Run a model and its base on the same inputs, and compare their outputs.

    Args:
        base: The source model.
        out: The model that was made from it.
        lora: The LoRA that was merged into the source model before, if there was one.
        trust_remote_code: Whether code from the models may be run.
        max_memory: The maximum memory for weights in bytes; the other weights stay on disk. None
            for the free memory.

    Raises:
        RefusedError: A model cannot be loaded or run, or their outputs cannot be compared.
    """
    options: dict[str, Any] = {"max_memory": max_memory, "trusted": trust_remote_code}
    try:
        inputs, of_base, window, offloaded = _load_and_run(base, lora=lora, **options)
        # Each model generates its own tokens; the pass without a cache uses the base's tokens.
        _, of_out, _, also_offloaded = _load_and_run(out, inputs, of_base.generated, **options)
    except RefusedError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"{out} cannot be compared with its base: {reason[:300]}") from error
    return _comparison(
        inputs, of_base, of_out, window=window, offloaded=offloaded or also_offloaded
    )


def _load_and_run(  # noqa: PLR0913 - a model, its inputs and the options of `compare`
    path: Path,
    inputs: _Inputs | None = None,
    generated: Any | None = None,
    *,
    lora: ModelPath | None = None,
    max_memory: int | None,
    trusted: bool,
) -> tuple[_Inputs, _Outputs, int, bool]:
    """Load a model, run it and free it, since two large models might not fit in memory.

    Args:
        path: The model.
        inputs: The inputs; None to create them for this model.
        generated: See `_run`.
        lora: The LoRA to merge into it, if any.
        max_memory: See `compare`.
        trusted: Whether code from the model may be run.

    Returns:
        Its inputs, its outputs, its longest window, and whether weights stayed on disk.
    """
    with _loaded(path, max_memory, lora, trusted=trusted) as model:
        inputs = inputs or _inputs(model, path, trusted=trusted)
        outputs = _run(model, inputs, generated)
        return inputs, outputs, _window(model.config), _is_offloaded(model)


class _Inputs(NamedTuple):
    """The inputs of both models: tokens, in batches of one.

    Attributes:
        random: Random tokens.
        text: The tokens of `TEXT`; None if there is no usable tokenizer.
    """

    random: Any
    text: Any | None


class _Outputs(NamedTuple):
    """The outputs of a model.

    Attributes:
        logits: The logits of the generated tokens, if the model generates, and of the inputs.
        generated: The generated tokens; None if the model cannot generate.
        perplexity: The perplexity on the text; None if it cannot be computed.
    """

    logits: list[Any]
    generated: Any | None
    perplexity: float | None


def _comparison(
    inputs: _Inputs, base: _Outputs, out: _Outputs, *, window: int, offloaded: bool
) -> ForwardComparison:
    """Compare the outputs of the base and of the model."""
    pairs = list(zip(base.logits, out.logits, strict=True))
    if base.generated is not None and pairs[0][0].shape == pairs[0][1].shape:
        # After the first generated token that differs, the inputs of the two models differ.
        same = int((base.generated == out.generated).int().cumprod(dim=1).sum())
        pairs[0] = (pairs[0][0][:, : same + 1], pairs[0][1][:, : same + 1])
    if any(one.shape != other.shape for one, other in pairs):
        raise RefusedError("the model and its base have vocabularies of different sizes")
    both = (base.perplexity, out.perplexity)
    return ForwardComparison(
        tokens=inputs.random.shape[1],
        window=window,
        text=0 if inputs.text is None else inputs.text.shape[1],
        new_tokens=0 if base.generated is None else _NEW_TOKENS,
        difference=max(float((one - other).abs().max()) for one, other in pairs),
        size=max(float(one.abs().max()) for one, _ in pairs),
        same_tokens=base.generated is None or base.generated.equal(out.generated),
        perplexity=None if both[0] is None or both[1] is None else (both[0], both[1]),
        offloaded=offloaded,
    )


@contextmanager
def _loaded(
    path: Path, max_memory: int | None, lora: ModelPath | None, *, trusted: bool
) -> Iterator[Any]:
    """Load a model in float32; the weights that do not fit in memory stay on disk."""
    import torch  # noqa: PLC0415 - takes seconds to import
    import transformers  # noqa: PLC0415
    from accelerate.utils import get_max_memory  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    meta_model.hide_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    gc.collect()  # free the previous model
    _check_kernels(read_json(path / "config.json"), path)
    config: Any = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=trusted)
    named = meta_model.named_class(config)
    memory = int(get_max_memory()["cpu"] * 0.8) if max_memory is None else max_memory
    needed = sum(tensor.elements for _, tensor in iterate_tensors(path)) * 4
    if lora is not None and needed > memory:
        raise RefusedError(f"{path}+{lora}: a LoRA is merged in memory, which is too small")
    with scratch_directory() as folder:
        offload = {
            "device_map": "auto",
            "max_memory": {"cpu": memory},
            "offload_folder": str(folder),
        }
        model, info = (named or transformers.AutoModelForCausalLM).from_pretrained(
            str(path),
            dtype=torch.float32 if lora is None else _merge_dtype(path),
            trust_remote_code=trusted,
            output_loading_info=True,
            **(offload if needed > memory else {}),
        )
        if info["missing_keys"]:
            raise RefusedError(
                f"{path}: {min(info['missing_keys'])}, which its class needs, is missing"
            )
        if model.main_input_name != "input_ids":
            raise RefusedError(f"{path}: its input is {model.main_input_name}, not tokens")
        if lora is not None:
            model = _merged(model, lora).float()
        yield model.eval()


def _merge_dtype(path: Path) -> Any:
    """Return the dtype in which mergekit merges a LoRA: that of the weights, if they have one."""
    import torch  # noqa: PLC0415

    dtypes = {tensor.dtype for _, tensor in iterate_tensors(path)}
    name = _dtypes.name_of(dtypes.pop()) if len(dtypes) == 1 else None
    return getattr(torch, name or "float32")


def _merged(model: Any, lora: ModelPath) -> Any:
    """Merge a LoRA into a model, as mergekit does."""
    try:
        from peft import PeftModel  # noqa: PLC0415
    except ImportError as error:
        raise RefusedError(
            f"the LoRA {lora} cannot be merged into the base, because peft is not installed"
        ) from error
    return PeftModel.from_pretrained(model, lora.path, revision=lora.revision).merge_and_unload()


_KERNELS = ("attn_implementation", "experts_implementation")
"""The ends of config keys that select kernels."""


def _check_kernels(config: Mapping[str, Any], path: Path) -> None:
    """Reject keys that make transformers download kernels, even if remote code is trusted."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_kernels(value, path)
        elif key.endswith(_KERNELS) and value not in meta_model.OWN_KERNELS:
            raise RefusedError(
                f"{path}: config.json: {key} is {value!r:.100}, which is not part of transformers",
                hint=f"remove {key} from config.json",
            )


def _window(config: Any) -> int:
    """Return the longest window of a layer, in tokens; 0 if there is none."""
    text = config.get_text_config(decoder=True)
    stated = [getattr(text, key, None) for key in _WINDOWS]
    return max((n for n in stated if isinstance(n, int) and not isinstance(n, bool)), default=0)


def _inputs(model: Any, path: Path, *, trusted: bool) -> _Inputs:
    """Create the inputs for a model and its base."""
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or _MAX_TOKENS
    count = min(max(_window(model.config), 0) + _TOKENS, limit, _MAX_TOKENS)
    rows = model.get_input_embeddings().weight.shape[0]
    special = _special_tokens(model.config.to_dict())
    plain = torch.tensor([token for token in range(rows) if token not in special])
    chosen = torch.randint(0, len(plain), (1, count), generator=torch.Generator().manual_seed(0))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trusted)
        text = tokenizer(TEXT, return_tensors="pt").input_ids[:, :limit]
    except Exception:  # noqa: BLE001 - a missing tokenizer raises many kinds of errors
        return _Inputs(plain[chosen], None)
    usable = text.shape[1] > 1 and int(text.max()) < rows
    return _Inputs(plain[chosen], text if usable else None)


def _special_tokens(config: Mapping[str, Any]) -> set[Any]:
    """Return the ids of the tokens with a special meaning, such as an image placeholder."""
    found: set[Any] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _special_tokens(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            found.update(
                n for n in (value if isinstance(value, list) else [value]) if n is not None
            )
    return found


def _run(model: Any, inputs: _Inputs, generated: Any | None = None) -> _Outputs:
    """Run a model.

    Args:
        model: The model.
        inputs: The inputs.
        generated: The generated tokens that are part of the input without a cache; None for those
            that this model generates.
    """
    import torch  # noqa: PLC0415

    own, outputs = None, []
    with torch.no_grad():
        tokens = inputs.random
        if model.can_generate():
            # Generate with a cache; the last tokens are beyond the window.
            start = tokens[:, : max(tokens.shape[1] - _NEW_TOKENS, 1)]
            own, logits = _generate(model, start)
            outputs.append(logits)
            tokens = torch.cat([start, own if generated is None else generated], dim=1)
            if model.config.is_encoder_decoder:
                tokens = inputs.random
        outputs.append(_logits(model, tokens, _TOKENS))
        perplexity = None
        if inputs.text is not None:
            outputs.append(_logits(model, inputs.text))
            if own is not None and not model.config.is_encoder_decoder:
                loss = torch.nn.functional.cross_entropy(outputs[-1][0, :-1], inputs.text[0, 1:])
                perplexity = math.exp(min(float(loss), _MAX_LOSS))
    if not all(bool(torch.isfinite(logits).all()) for logits in outputs):
        raise RefusedError(f"{model.name_or_path}: its logits are not finite")
    return _Outputs(outputs, own, perplexity)


def _generate(model: Any, start: Any) -> tuple[Any, Any]:
    """Generate tokens greedily, and return them and their logits."""
    import torch  # noqa: PLC0415
    from transformers import GenerationConfig  # noqa: PLC0415

    # The model's own generation settings would change the logits.
    before = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        pad_token_id=0,
        max_new_tokens=_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    output = model.generate(start, attention_mask=torch.ones_like(start))
    return output.sequences[:, -_NEW_TOKENS:], torch.stack(output.logits, dim=1)


def _logits(model: Any, tokens: Any, last: int | None = None) -> Any:
    """Compute the logits of tokens without a cache.

    Args:
        model: The model.
        tokens: The tokens.
        last: The number of last tokens whose logits are computed, if the class supports that; None
            for all tokens.
    """
    parameters = inspect.signature(model.forward).parameters
    arguments = {"input_ids": tokens}
    if last is not None and "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = last
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    return model(**arguments).logits.float().cpu()


def _is_offloaded(model: Any) -> bool:
    """Return whether some weights of a model are on disk."""
    return "disk" in getattr(model, "hf_device_map", {}).values()
