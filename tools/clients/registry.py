"""List the clients, one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from clients import llama_cpp, quantizers, runtimes, trainers, transformers4
from clients.row import Row

CLIENTS: Mapping[str, Callable[[], Iterator[Row]]] = {
    transformers4.NAME: transformers4.rows,
    llama_cpp.NAME: llama_cpp.rows,
    runtimes.CTRANSLATE2: runtimes.ctranslate2,
    runtimes.ONNX: runtimes.onnx,
    runtimes.LM_EVAL: runtimes.lm_eval,
    quantizers.TORCHAO: quantizers.torchao,
    quantizers.GPTQ: quantizers.gptq,
    trainers.PEFT: trainers.peft,
    trainers.TRL: trainers.trl,
    trainers.LLAMA_FACTORY: trainers.llama_factory,
    trainers.MS_SWIFT: trainers.ms_swift,
}
"""A function for each client that compares grown models with their bases there."""
