"""Write Llamas of any size with random weights, without torch."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Size:
    """The dimensions of a Llama."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value_heads: int
    shards: int
    vocabulary: int = 32_000
    head: int = 64

    @property
    def config(self) -> dict[str, object]:
        """The content of its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.key_value_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes, in the order of the layers."""
        hidden, inner, narrow = self.hidden, self.intermediate, self.key_value_heads * self.head
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
            yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.self_attn.k_proj.weight", (narrow, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (narrow, hidden)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)


SMALL = Size("small", 16, 1024, 2816, 4, shards=1)
MIDDLE = Size("middle", 24, 2048, 5632, 4, shards=3)
LARGE = Size("large", 16, 4096, 11_008, 64, shards=4)


def build(size: Size, path: Path) -> Path:
    """Write a model unless it exists already."""
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    total = sum(nbytes(shape) for _, shape in size.tensors())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in size.tensors():
        if filled >= total / size.shards:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes(shape)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write(path / name, shard)
    if len(shards) > 1:
        weight_map = {t: n for n, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(size.config))
    return path


def build_sparse(size: Size, path: Path) -> Path:
    """Write a model of zeros in one file, which take no disk space."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / "model.safetensors").open("wb") as out:
        end = out.write(_header(dict(size.tensors())))
        out.truncate(end + sum(nbytes(shape) for _, shape in size.tensors()))
    (path / "config.json").write_text(json.dumps(size.config))
    return path


def nbytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    count = _BYTES
    for length in shape:
        count *= length
    return count


def _write(file: Path, shard: dict[str, tuple[int, ...]]) -> None:
    # The same megabytes repeat, since the content does not affect the time of a copy.
    noise = bytes(byte & 0x3F for byte in os.urandom(2**22))  # small numbers, no NaN
    left = sum(map(nbytes, shard.values()))
    with file.open("wb") as out:
        out.write(_header(shard))
        while left:
            left -= out.write(noise[: min(len(noise), left)])


def _header(shard: dict[str, tuple[int, ...]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        stop = offset + nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
