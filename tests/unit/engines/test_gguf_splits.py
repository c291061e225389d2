"""The layout of GGUF files: ggml accepts it, every tensor is there once, and blocks are shared."""

from __future__ import annotations

import math
from pathlib import Path

import gguf_files
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave._stored_tensor import Shard, Stamp, Tensor
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.engines.gguf_splits import PADDING, OutSplit
from mergekit_interleave.engines.out_file import in_order
from mergekit_interleave.gguf import header, values
from mergekit_interleave.gguf.ggml_types import BY_NAME
from mergekit_interleave.planning.tensor_plan import TensorSpec

BLOCK = 4096
REF = ModelRef(ModelPath("base"))

kinds = st.sampled_from(["F32", "F16", "Q4_K", "Q8_0", "Q6_K"])
sizes = st.lists(st.tuples(kinds, st.integers(1, 40)), min_size=1, max_size=6)


def specs_of(sizes: list[tuple[str, int]], start: int, zeroed: str) -> list[TensorSpec]:
    """Return tensors that lie one after another in a file, and a copy of each."""
    shard = Shard(Path("base.gguf"), {}, Stamp(0, 0, 10**9, 0))
    found = []
    for index, (kind, rows) in enumerate(sizes):
        row = BY_NAME[kind]
        shape = (rows, 256)
        nbytes = math.prod(shape) // row.elements * row.nbytes
        tensor = Tensor(kind, shape, start, nbytes, shard)
        start += -(-nbytes // 32) * 32
        for copy in range(2):
            zero = copy == 1 and str(index) in zeroed
            found.append(
                TensorSpec(
                    f"blk.{copy}.t{index}",
                    REF,
                    f"blk.0.t{index}",
                    tensor,
                    0 if zero else None,
                    kind,
                    kind,
                    shape,
                    nbytes,
                    layer=copy,
                )
            )
    return found


@given(
    sizes=sizes,
    start=st.integers(10, 300).map(lambda number: number * 32),
    zeroed=st.sampled_from(["", "0", "024"]),
    alignment=st.sampled_from([None, 32, 64, 4096, 8192]),
    share=st.booleans(),
)
def test_every_layout(  # noqa: PLR0913 - one parameter for each strategy
    *,
    sizes: list[tuple[str, int]],
    start: int,
    zeroed: str,
    alignment: int | None,
    share: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each tensor is written once with its bytes, and ggml and this project's reader accept it."""
    specs = specs_of(sizes, start, zeroed)
    end = max(spec.tensor.start + spec.nbytes for spec in specs)
    data = (bytes(range(1, 252)) * (end // 251 + 1))[:end]
    metadata = {"general.architecture": values.text("llama")}
    if alignment is not None:
        metadata["general.alignment"] = values.unsigned(alignment)
    out = OutSplit("out.gguf", in_order(specs, BLOCK, alignment or 32), BLOCK, metadata, 3)
    head = out.header()
    written = bytearray(head)
    shared = 0
    for step in out.steps(len(head), lambda _: share):
        assert step.at == len(written)
        if step.how == "share":
            assert (step.at % BLOCK, step.start % BLOCK, step.length % BLOCK) == (0, 0, 0)
            shared += step.length
        if step.how in ("share", "copy"):
            written += data[step.start : step.start + step.length]
        else:
            assert step.how == "hole"
            written += bytes(step.length)
    assert len(written) == len(head) + out.nbytes
    file = tmp_path_factory.mktemp("out") / "out.gguf"
    file.write_bytes(written)
    assert gguf_files.ggml_reads(file)
    found = header.read(file)
    assert found.start == len(head)
    assert {*found.metadata} - {PADDING} == {*metadata}
    for spec in specs:
        tensor = found.tensors[spec.name]
        own = bytes(written[tensor.start : tensor.start + tensor.nbytes])
        source = data[spec.tensor.start : spec.tensor.start + spec.nbytes]
        assert own == (bytes(spec.nbytes) if spec.scale == 0 else source)
    assert (
        shared
        or not share
        or all(spec.nbytes < 3 * BLOCK for spec in specs)
        or ((alignment or 32) > 32)
    )


def test_everything_is_shared_where_sizes_are_whole_blocks() -> None:
    """If all sizes are multiples of the block size, all copies share, whatever the start is."""
    specs = specs_of([("F32", 4), ("F32", 8), ("Q4_K", 256), ("F32", 4)], 7 * 32, "")
    out = OutSplit("out.gguf", in_order(specs, BLOCK, 32), BLOCK, {}, 3)
    steps = list(out.steps(len(out.header()), lambda _: True))
    shared = sum(step.length for step in steps if step.how == "share")
    # The first and the last block of each run of tensors are copied.
    assert out.nbytes - shared <= 2 * BLOCK * len(specs)
    assert shared > out.nbytes * 0.5
