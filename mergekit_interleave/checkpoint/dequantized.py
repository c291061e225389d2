"""Convert a GGUF file to a model directory, with transformers, which dequantizes the tensors.

Only `sample` and `scan` use this: they compute with transformers, and write no model.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

from mergekit_interleave import _requirements
from mergekit_interleave.checkpoint.checkpoint import is_checkpoint
from mergekit_interleave.checkpoint.meta_model import hide_bars
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf.model import GgufModel

WANTED = "gguf>=0.10"
"""What transformers requires to read GGUF files; part of the extra `gguf`."""


def convert(model: GgufModel, into: Path) -> None:
    """Write the weights in float32, the config and the tokenizer of a GGUF file, once.

    Args:
        model: The file. It must not be split.
        into: The directory to write.

    Raises:
        RequirementError: The package gguf is not installed.
        RefusedError: transformers cannot read the file.
    """
    if is_checkpoint(into):
        return
    _requirements.check_extra(WANTED)
    if len(model.files) > 1:
        raise RefusedError(
            f"{model.ref}: transformers reads no GGUF file that is split",
            hint="merge the splits first: `llama-gguf-split --merge FIRST OUT.gguf`",
        )
    import torch  # noqa: PLC0415 - takes seconds to import
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    hide_bars()
    folder, name = str(model.path.parent), model.path.name
    try:
        with redirect_stderr(io.StringIO()):  # its progress bar cannot be disabled
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:
        raise RefusedError(
            f"{model.ref}: transformers cannot read this GGUF file: {error!s:.200}",
            hint="name the model's directory, from which the file was converted",
        ) from error
    loaded.save_pretrained(into)
    tokenizer.save_pretrained(into)
