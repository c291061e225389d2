"""Memory grows with the headers of a model, not with its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import write_header

from mergekit_interleave.checkpoint.safetensors_header import iterate_tensors
from mergekit_interleave.engines import stream

EXPERTS, HIDDEN, INNER, WORDS = 128, 8, 16, 64


def make_moe(path: Path, *, layers: int, shards: int) -> Path:
    """Make a model of many tiny experts: 393 tensors for each layer, in many shards."""
    tensors = {"model.embed_tokens.weight": [WORDS, HIDDEN]}
    square, expert = [HIDDEN, HIDDEN], [INNER, HIDDEN]
    for i in range(layers):
        layer = {
            "input_layernorm": [HIDDEN],
            "post_attention_layernorm": [HIDDEN],
            **{f"self_attn.{name}_proj": square for name in "qkvo"},
            **{f"self_attn.{name}_norm": [HIDDEN] for name in "qk"},
            "mlp.gate": [EXPERTS, HIDDEN],
        }
        for e in range(EXPERTS):
            layer[f"mlp.experts.{e}.gate_proj"] = layer[f"mlp.experts.{e}.up_proj"] = expert
            layer[f"mlp.experts.{e}.down_proj"] = expert[::-1]
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [WORDS, HIDDEN]}
    path.mkdir()
    names = list(tensors)
    weight_map = {}
    per_shard = -(-len(names) // shards)
    for start in range(0, len(names), per_shard):
        file = f"model-{start // per_shard:05d}.safetensors"
        header, offset = {}, 0
        for name in names[start : start + per_shard]:
            shape = tensors[name]
            stop = offset + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
            weight_map[name] = file
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        write_header(path / file, text, os.urandom(offset))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HIDDEN,
        "vocab_size": WORDS,
        "num_experts": EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


# The child measures itself: the parent's figures for it include the fork of this large process.
SCRIPT = """
import sys
from mergekit_interleave.cli import main as cli
try:
    cli.main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def peak_of(base: Path, out: Path) -> int:
    """Return the peak memory, in bytes, of the process that grows a model."""
    words = ["run", "interleave: every 4", str(out), "--model", str(base), "--engine", "stream"]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True
    )
    return int(result.stderr) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_shards(tmp_path: Path) -> None:
    """60,000 tensors in 1,000 shards take the memory of 4,000 plus some kilobytes for each."""
    peaks = {}
    for name, layers, shards in (("few", 8, 4), ("many", 128, 1000)):
        base = make_moe(tmp_path / name, layers=layers, shards=shards)
        peaks[name] = peak_of(base, tmp_path / f"{name}-out")
    tensors = {n: sum(1 for _ in iterate_tensors(tmp_path / f"{n}-out")) for n in peaks}
    assert tensors["many"] > 60_000
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 980
    assert peaks["many"] < peaks["few"] + 8_000 * (tensors["many"] - tensors["few"])
    for name, peak in peaks.items():  # the estimate of `plan` is right within a factor of 2
        assert peak / 2 < stream.memory(tensors[name]) < peak * 2
