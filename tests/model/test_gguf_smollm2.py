"""SmolLM2 as GGUF: grown files in llama.cpp, and against files converted from grown models."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import requantize

import mergekit_interleave as api
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.gguf.model import open_model
from mergekit_interleave.verification import llama_cpp

SMOLLM2 = os.environ.get("MK_INTERLEAVE_SMOLLM2", "")
CONVERTER = os.environ.get("MK_INTERLEAVE_CONVERTER", "")

pytestmark = pytest.mark.skipif(not SMOLLM2, reason="needs MK_INTERLEAVE_SMOLLM2")

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived an old man who",
)

TYPES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""The legacy, K- and I-quantizations."""

IDENTITIES = ("interleave: every 5", "append: 2")
OTHERS = ("repeat: [8, 24]", "drop: [10, 13]")


def said(file: Path) -> list[llama_cpp.Steps]:
    """Return 64 greedy tokens for each prompt, with their top log-probabilities."""
    return llama_cpp.generate(file, PROMPTS, 128, count=64, threads=1)


def converted(directory: Path, out: Path) -> Path:
    """Convert a model directory with the converter of llama.cpp."""
    command = [sys.executable, str(Path(CONVERTER) / "convert_hf_to_gguf.py"), str(directory)]
    subprocess.run(
        [*command, "--outfile", str(out), "--outtype", "f16"],
        env={**os.environ, "PYTHONPATH": CONVERTER},
        check=True,
        capture_output=True,
    )
    return out


def digests(file: Path) -> dict[str, tuple[str, str]]:
    """Return the type and a digest of the bytes of each tensor."""
    found = {}
    with file.open("rb") as opened:
        for name, tensor in open_model(ModelRef(ModelPath(str(file)))).tensors.items():
            opened.seek(tensor.start)
            found[name] = tensor.dtype, hashlib.sha256(opened.read(tensor.nbytes)).hexdigest()
    return found


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2 as an F16 file."""
    if not CONVERTER:
        pytest.skip("needs MK_INTERLEAVE_CONVERTER")
    return converted(Path(SMOLLM2), tmp_path_factory.mktemp("base") / "smollm2-f16.gguf")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return F16 files that were converted from grown model directories, by directive."""
    files = {}
    for number, directive in enumerate(OTHERS):
        folder = tmp_path_factory.mktemp("grown")
        api.run(directive, folder / "model", model=SMOLLM2, engine="stream")
        files[directive] = converted(folder / "model", folder / f"{number}.gguf")
    return files


def test_identities_of_a_quantized_file(tmp_path: Path) -> None:
    """An identity of the published Q4_1 file says what its base says, to the last digit."""
    base = Path(SMOLLM2).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not base.is_file():
        pytest.skip(f"needs {base.name}")
    api.run("interleave: every 5", tmp_path / "out.gguf", model=base)
    assert said(tmp_path / "out.gguf") == said(base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", *TYPES])
def test_every_quantization(kind: str, f16: Path, grown: dict[str, Path], tmp_path: Path) -> None:
    """In llama.cpp identities equal their base; other files equal the converted grown model.

    The files to compare with are converted from the grown safetensors, and quantized alike.
    """
    base = f16 if kind == "F16" else requantize(f16, tmp_path / "base.gguf", kind)
    expected = said(base)
    for directive in IDENTITIES:
        api.run(directive, tmp_path / "out.gguf", model=base, force=True)
        assert said(tmp_path / "out.gguf") == expected, directive
    for directive in OTHERS:
        api.run(directive, tmp_path / "out.gguf", model=base, force=True)
        other = grown[directive]
        if kind != "F16":
            other = requantize(other, tmp_path / "other.gguf", kind)
        assert digests(tmp_path / "out.gguf") == digests(other), directive
    assert any(name == kind for name, _ in digests(base).values())
