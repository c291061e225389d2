"""Does the result compute what its base computes? Measured, where nothing is known of the type."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from mergekit_interleave.errors import RefusedError

MOST_DIFFERENT = 1e-5
"""Of the size of the logits, in float32: more is no rounding."""

_TOKENS = 64
_NEW_TOKENS = 8


def check(base: Path, out: Path, *, trust_remote_code: bool) -> None:
    """Compare logits on random tokens, and greedy text.

    Args:
        base: The source model.
        out: The result.
        trust_remote_code: Whether code that they bring may be run.

    Raises:
        RefusedError: They differ, or one of them cannot be loaded.
    """
    try:
        (expected, text), (found, new_text) = (
            _outputs(path, trust_remote_code=trust_remote_code) for path in (base, out)
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RefusedError(
            f"the result cannot be compared with its base: {reason[:300]}"
        ) from error
    size = expected.abs().max()
    difference = float((expected - found).abs().max() / size)
    if not difference <= MOST_DIFFERENT or not text.equal(new_text):
        raise RefusedError(
            "nothing is known of this model type, and the result does not compute what its "
            f"base: its logits differ by {difference:.0e} of their size",
            hint="perhaps with other names: all that writes to the residual stream must be zero",
        )


def _outputs(path: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    import torch  # noqa: PLC0415 - seconds
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    size = model.get_input_embeddings().weight.shape[0]
    window = getattr(model.config, "sliding_window", None) or 0
    count = max(_TOKENS, int(window) + _TOKENS)
    tokens = torch.randint(0, size, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        text = model.generate(
            tokens[:, :_TOKENS],
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
        )
    del model
    gc.collect()  # two large models at once would not fit
    return logits, text
