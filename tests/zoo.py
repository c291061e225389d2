"""Every causal-LM type that the installed transformers can build at toy size, and what comes of it.

Run as a script, it expands all of them and writes the table in docs/architectures.md.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mergekit_interleave import architecture, cli

DEPTH = 8
TOKENS = 40  # more than every window and pattern of the toy models
PLANS = ("interleave: every 2", "repeat: {layers: [3, 5], times: 3}, zero: auto")
MOST_PARAMETERS = 30_000_000

# Sizes, by whatever name a config class knows them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "num_blocks",
        ],
        DEPTH,
    ),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim"], 32),
    **dict.fromkeys(
        [
            "intermediate_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "dff",
        ],
        48,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "mamba_n_heads",
            "mamba_num_heads",
            "mamba_d_conv",
            "linear_num_value_heads",
            "rotary_dim",
        ],
        4,
    ),
    **dict.fromkeys(
        [
            "num_key_value_heads",
            "num_experts_per_tok",
            "moe_k",
            "moe_topk",
            "mamba_expand",
            "linear_num_key_heads",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            "head_dim",
            "d_kv",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "mamba_d_state",
            "ssm_state_size",
            "state_size",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ],
        8,
    ),
    **dict.fromkeys(
        [
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "q_lora_rank",
            "kv_lora_rank",
            "mamba_d_head",
            "mamba_head_dim",
            "sliding_window",
            "attention_window",
        ],
        16,
    ),
    **dict.fromkeys(
        ["n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups", "eos_token_id"],
        1,
    ),
    **dict.fromkeys(
        ["vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 128
    ),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What some types need besides; None leaves a size out.
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4_moe_lite", "minicpm3", "kimi_linear"), _LATENT),
    "afmoe": {"num_dense_layers": 2},
    "bamba": {"attn_layer_indices": [1, 4]},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "deepseek_v2": {**_LATENT, "first_k_dense_replace": 2},
    "dots1": {"first_k_dense_replace": 2},
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 128,
    },
    "glm4_moe": {"first_k_dense_replace": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (DEPTH // 2)},
    "hrm_text": {"num_layers_per_stack": 4, "H_cycles": 1, "L_cycles": 1},
    "prophetnet": {"num_hidden_layers": None},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlnet": {"max_position_embeddings": None},
}


@dataclass(frozen=True)
class Outcome:
    """What came of expanding a type.

    Attributes:
        result: `exact`, `refused`, `wrong` or `failed`.
        detail: The engine, the reason or the error.
    """

    result: str
    detail: str


def build(model_type: str) -> Any:
    """A toy model with attention far from flat, and gains and biases away from where they start.

    Raises:
        Exception: transformers cannot build the type at this size.
    """
    config = _config(model_type)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).parameters()
        size = sum(parameter.numel() for parameter in parameters)
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters at the smallest")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    sharp = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn", "Wqkv")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1 and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
            elif any(part in name for part in sharp):
                parameter.mul_(8)
    _logits(model)
    return model


def expand(base: Path, plan: str, out: Path) -> Outcome:
    """Expand a checkpoint with `run` and compare the result with it.

    Args:
        base: The checkpoint.
        plan: An identity directive.
        out: Where to put the result.
    """
    said = io.StringIO()
    status: Any = 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(["run", plan, str(out), "--model", str(base)])
        except SystemExit as left:
            status = left.code
    if status:
        words = said.getvalue().strip().splitlines()[-1] if said.getvalue() else "no word"
        words = next((w for w in said.getvalue().splitlines() if w.startswith("error:")), words)
        reason = words.removeprefix("error: ").replace(f"{base}: ", "")
        refused = "is refused: " in reason or "no config.json can say" in reason
        return Outcome("refused" if refused else "failed", reason.split("is refused: ")[-1])
    engine = "plain writer" if "plain writer" in said.getvalue() else "mergekit"
    before, after = _load(base), _load(out)
    expected, found = _logits(before), _logits(after)
    difference = float((expected - found).abs().max() / expected.abs().max())
    if difference > 1e-5:
        return Outcome("wrong", f"logits differ by {difference:.0e}")
    if not torch.equal(_text(before), _text(after)):
        return Outcome("wrong", "greedy text differs")
    return Outcome("exact", engine)


def _config(model_type: str) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    probe = config_class()
    aliases = getattr(probe, "attribute_map", {})
    settings = {}
    for key, value in _SIZES.items():
        own = getattr(config_class, key, None)
        if isinstance(own, property) and own.fset is None:
            continue
        with contextlib.suppress(Exception):  # some attributes differ by layer and say so
            known = key in aliases or hasattr(probe, key)
            if known and not isinstance(getattr(probe, key, None), list):
                settings[key] = value
    settings |= _OWN.get(model_type, {})
    config = config_class(**{key: v for key, v in settings.items() if v is not None})
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _load(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise AssertionError(f"{info['missing_keys']} {info['unexpected_keys']}")
    return model.eval()


def _tokens() -> torch.Tensor:
    return torch.randint(3, 120, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=_tokens()).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return logits


def _text(model: Any) -> torch.Tensor:
    """Greedy text, with the cache that the type has."""
    prompt = _tokens()[:1, : TOKENS // 2]
    text: torch.Tensor = model.generate(
        prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return text


def quiet() -> None:
    """Transformers' words and bars are not the subject."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main(target: Path) -> int:
    """Expand every type and write the table; 1 where anything is neither exact nor refused."""
    quiet()
    rows, bad, unbuilt = [], 0, []
    exact = 0
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder, "base")
            try:
                build(model_type).save_pretrained(base)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
                reason = " ".join(str(error).split())[:80].replace("|", "/")
                unbuilt.append(f"| {model_type} | {type(error).__name__}: {reason} |")
                continue
            outcomes = []
            for i, plan in enumerate(PLANS):
                try:
                    outcomes.append(expand(base, plan, Path(folder, f"out{i}")))
                except Exception as error:  # noqa: BLE001 - the table says so
                    outcomes.append(Outcome("failed", f"{type(error).__name__}: {error}"[:120]))
        worst = max(outcomes, key=lambda o: ("exact", "refused", "wrong", "failed").index(o.result))
        unknown = architecture.family_of(model_type) is None
        exact += worst.result == "exact"
        bad += worst.result == "wrong" or (worst.result == "failed" and not unknown)
        result = "refused" if unknown else worst.result
        rows.append(f"| {model_type} | {result} | {worst.detail} |")
        print(rows[-1], flush=True)
    target.parent.mkdir(exist_ok=True)
    target.write_text(
        _PAGE.format(
            version=transformers.__version__,
            count=len(rows),
            exact=exact,
            plans=" and ".join(f"`{plan}`" for plan in PLANS),
            rows="\n".join(rows),
            unbuilt="\n".join(unbuilt),
        ),
        encoding="utf-8",
    )
    return 1 if bad else 0


_PAGE = """# Architectures

What `mk-interleave run` makes of each causal-LM type that transformers {version} builds at
toy size: {count} types, {exact} of them exact, by {plans}.

*Exact*: float32 logits within 1e-5 of their size of the base's, on more tokens than any window, and
the same greedy text with the cache. *Refused*: before a byte is written, with this reason. Made by
`make zoo`.

| type | outcome | engine or reason |
| --- | --- | --- |
{rows}

## Not built

These need other settings than the generic toy sizes.

| type | why |
| --- | --- |
{unbuilt}
"""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
