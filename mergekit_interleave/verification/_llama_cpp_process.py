"""Generate greedily with llama.cpp, in a process of its own, which llama.cpp may abort.

The input is the JSON of `llama_cpp.Job`. The last line of the output is the result as JSON: for
each prompt, for each step, the token and the log-probabilities of the most likely tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_LEAST = 16
"""A number of tokens that the server always accepts; it divides them into smaller batches."""


def generate(job: dict[str, Any]) -> list[list[Any]]:
    """Generate greedily for each prompt.

    Args:
        job: See `llama_cpp.Job`.
    """
    import xllamacpp  # noqa: PLC0415 - this process exists to import it

    settings = xllamacpp.CommonParams()
    settings.model.path = job["file"]
    settings.n_ctx, settings.n_parallel, settings.warmup = job["context"], 1, False
    settings.n_batch, settings.n_ubatch = max(job["batch"], _LEAST), job["batch"]
    # Checkpoints of the context would divide the end of a prompt into other batches.
    settings.n_ctx_checkpoints = 0
    settings.cpuparams.n_threads = job["threads"]
    server = xllamacpp.Server(settings)
    found = []
    for prompt in job["prompts"]:
        request = {
            "prompt": prompt,
            "n_predict": job["count"],
            "n_probs": job["top"],
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        steps = answer["choices"][0]["logprobs"]["content"]
        found.append(
            [[s["id"], {str(t["id"]): t["logprob"] for t in s["top_logprobs"]}] for s in steps]
        )
    return found


if __name__ == "__main__":
    job_given = json.load(sys.stdin)
    sys.path[:] = job_given["path"]  # this process starts without that of the user
    print(json.dumps(generate(job_given)))  # noqa: T201 - the result
