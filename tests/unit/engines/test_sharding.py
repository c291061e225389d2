"""The distribution of tensors over files, their order and the headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave._stored_tensor import Shard, Stamp, Tensor
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.engines import sharding
from mergekit_interleave.engines.sharding import OutShard, shards_of
from mergekit_interleave.layout.layout import Constant
from mergekit_interleave.planning.tensor_plan import TensorSpec

BLOCK = 4096
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}
MODEL = ModelRef(ModelPath("base"))


def source(name: str = "model.safetensors", **metadata: str) -> Shard:
    """Return a file of a base."""
    return Shard(Path(name), metadata, Stamp(0, 0, 0, 0))


def parts_of(
    shard: Shard, sizes: Sequence[tuple[str, int]], start: int, *, zeroed: str = ""
) -> list[TensorSpec]:
    """Return consecutive tensors, each of them twice: unchanged, and copied or zeroed."""
    specs = []
    for i, (dtype, count) in enumerate(sizes):
        tensor = Tensor(dtype, (count,), start, count * WIDTHS[dtype], shard)
        start += tensor.nbytes
        specs += [
            TensorSpec(
                name=f"{shard.file.stem}.{i}.{copy}",
                model=MODEL,
                source=f"{shard.file.stem}.{i}",
                tensor=tensor,
                scale=0 if copy and str(i) in zeroed else None,
                dtype=dtype,
                through=dtype,
                shape=tensor.shape,
                nbytes=tensor.nbytes,
            )
            for copy in range(2)
        ]
    return specs


def entries(shard: OutShard) -> dict[str, dict[str, object]]:
    """Return the content of a header."""
    header = shard.header()
    (length,) = struct.unpack("<Q", header[:8])
    assert length == len(header) - 8
    content = json.loads(header[8:])
    assert isinstance(content, dict)
    return content


def written(shard: OutShard, data: bytes, *, share: bool) -> bytes:
    """Return the bytes of a file, written step by step."""
    header = shard.header()
    file = bytearray(header)
    for step in shard.steps(len(header), lambda _: share):
        assert step.at == len(file)
        if step.how == "share":
            assert (step.at % BLOCK, step.start % BLOCK, step.length % BLOCK) == (0, 0, 0)
        if step.how in ("share", "copy"):
            file += data[step.start : step.start + step.length]
        else:
            file += (step.data or b"\0") * (step.length // len(step.data or b"\0"))
    return bytes(file)


tensors = st.lists(
    st.tuples(st.sampled_from(sorted(WIDTHS)), st.sampled_from([0, 1, 3, 512, 2048, 5000])),
    min_size=1,
    max_size=6,
)


class TestEveryDistribution:
    """Properties of any set of tensors."""

    @given(
        sizes=tensors,
        start=st.integers(8, 9000),
        limit=st.sampled_from([1, 5000, 10**9]),
        zeroed=st.sampled_from(["", "0", "024"]),
        share=st.booleans(),
    )
    def test_each_tensor_is_written_once(
        self, sizes: list[tuple[str, int]], start: int, limit: int, zeroed: str, *, share: bool
    ) -> None:
        """Each tensor is written once, aligned and without gaps, with the right bytes."""
        specs = parts_of(source(), sizes, start, zeroed=zeroed)
        size = start + sum(spec.nbytes for spec in specs) // 2
        data = (bytes(range(1, 252)) * (size // 251 + 1))[:size]
        shards = shards_of(specs, limit, BLOCK)
        found = {}
        for shard in shards:
            content = entries(shard)
            header = shard.header()
            assert len(header) % 8 == 0
            assert content.pop("__metadata__") == {"format": "pt"}
            file = written(shard, data, share=share)
            end = 0
            for name, entry in content.items():
                begin, stop = entry["data_offsets"]  # type: ignore[misc]
                assert begin == end, "sorted by offset, without gaps"
                assert begin % WIDTHS[str(entry["dtype"])] == 0
                found[name] = file[len(header) + begin : len(header) + stop]
                end = stop
            assert len(file) == len(header) + end
            assert end <= limit or len(content) == 1
        assert found == {
            spec.name: bytes(spec.nbytes)
            if spec.scale == 0
            else data[spec.tensor.start : spec.tensor.start + spec.nbytes]
            for spec in specs
        }


class TestNames:
    """Files have the names that the Hub expects."""

    def test_one_file(self) -> None:
        """A single file has no number in its name."""
        (shard,) = shards_of(parts_of(source(), [("F32", 8)], 8), 10**9, BLOCK)
        assert shard.name == "model.safetensors"

    def test_several_files(self) -> None:
        """Several files are numbered."""
        shards = shards_of(parts_of(source(), [("F32", 8)] * 2, 8), 64, BLOCK)
        assert [shard.name for shard in shards] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]

    def test_each_file_has_one_source(self) -> None:
        """Each file has one source, and the sources keep their order."""
        one, other = source("b.safetensors"), source("a.safetensors")
        specs = [*parts_of(one, [("F32", 8)], 8), *parts_of(other, [("F32", 8)], 8)]
        assert [shard.source for shard in shards_of(specs, 10**9, BLOCK)] == [one, other]


class TestHeader:
    """Tests of the header."""

    def test_the_bases_metadata_is_kept(self) -> None:
        """The base's metadata is kept, and a missing format is added."""
        (shard,) = shards_of(parts_of(source(made="by hand"), [("F32", 8)], 8), 10**9, BLOCK)
        assert entries(shard)["__metadata__"] == {"format": "pt", "made": "by hand"}
        (shard,) = shards_of(parts_of(source(format="mlx"), [("F32", 8)], 8), 10**9, BLOCK)
        assert entries(shard)["__metadata__"] == {"format": "mlx"}

    @pytest.mark.parametrize("start", [8, 2344, 4096, 40_000])
    def test_the_data_starts_at_the_offset_of_the_source(self, start: int) -> None:
        """Within a block, the data starts at the same offset as in the source."""
        (shard,) = shards_of(parts_of(source(), [("F32", 8)], start), 10**9, BLOCK)
        assert (len(shard.header()) - start) % BLOCK == 0

    def test_an_unaligned_source(self) -> None:
        """The header is not padded to the offset of an unaligned source."""
        (shard,) = shards_of(parts_of(source(), [("U8", 8)], 13), 10**9, BLOCK)
        assert len(shard.header()) < 300


def test_a_header_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header above the limit of 100 MB is split over more files."""
    monkeypatch.setattr(sharding, "_HEADER", 1000)
    shards = shards_of(parts_of(source(), [("F32", 8)] * 20, 8), 10**9, BLOCK)
    assert len(shards) > 3
    assert all(len(shard.header().rstrip()) < 1100 for shard in shards)


class TestSharing:
    """Tests of how much data can be shared."""

    SIZES = (("BF16", 3072), ("BF16", 2048 * 40), ("BF16", 100), ("BF16", 2048 * 60))

    def by_how(self, zeroed: str = "", start: int = 1000) -> dict[str, int]:
        """Return the number of bytes for each way of writing."""
        (shard,) = shards_of(parts_of(source(), self.SIZES, start, zeroed=zeroed), 10**9, BLOCK)
        steps = sorted(shard.steps(len(shard.header()), lambda _: True), key=lambda step: step.how)
        return {
            how: sum(step.length for step in group)
            for how, group in groupby(steps, lambda step: step.how)
        }

    def test_whole_blocks_are_shared(self) -> None:
        """Large tensors share their blocks; small tensors and edges are copied."""
        shared = self.by_how()
        assert shared["share"] >= 2 * BLOCK * (40 + 60) - 8 * BLOCK
        assert shared["copy"] <= 8 * BLOCK + 3072 * 4

    def test_zeros_are_holes(self) -> None:
        """Zeroed tensors are holes and do not shift the other tensors."""
        assert self.by_how(zeroed="1")["hole"] == BLOCK * 40
        assert self.by_how(zeroed="1")["share"] >= BLOCK * (40 + 60 + 60) - 8 * BLOCK

    def test_a_small_tensor_at_the_front(self) -> None:
        """A small unaligned tensor at the front does not prevent sharing of the others."""
        whole = source()
        specs = [
            parts_of(whole, [("BF16", 4)], 900)[0],
            parts_of(whole, [("BF16", 2**17)], 1008)[0],
        ]
        specs[1] = replace(specs[1], name="big", source="big")
        (shard,) = shards_of(specs, 10**9, BLOCK)
        steps = shard.steps(len(shard.header()), lambda _: True)
        assert sum(step.length for step in steps if step.how == "share") > BLOCK * 60

    def test_an_unaligned_source_is_copied(self) -> None:
        """No tensor of an unaligned source is shared."""
        assert self.by_how(start=1001).keys() == {"copy"}


class TestRuns:
    """Copies are in few runs of the base, because each seam costs bytes on the Hub."""

    WHOLE = (("BF16", 2048 * 3), ("BF16", 2048), ("BF16", 2048 * 2))

    def order(self, sizes: Sequence[tuple[str, int]], zeroed: str = "") -> list[str]:
        """Return the number of each tensor in the base, and whether it is a copy, in order."""
        (shard,) = shards_of(parts_of(source(), sizes, 1000, zeroed=zeroed), 10**9, BLOCK)
        return [spec.name.removeprefix("model.") for spec in shard.specs]

    def test_whole_blocks(self) -> None:
        """The copies of adjacent tensors of whole blocks are adjacent."""
        assert self.order(self.WHOLE) == ["0.0", "1.0", "2.0", "0.1", "1.1", "2.1"]

    def test_a_small_tensor_between(self) -> None:
        """A small tensor separates the copies, so that those before it keep their offset."""
        sizes = [self.WHOLE[0], ("BF16", 100), *self.WHOLE[1:]]
        first = ["0.0", "0.1"]
        assert self.order(sizes) == [*first, "1.0", "2.0", "3.0", "2.1", "3.1", "1.1"]

    def test_zeros_are_together(self) -> None:
        """Zeros separate no copies, and are together at the end."""
        sizes = [*self.WHOLE, ("BF16", 100)]
        order = ["0.0", "1.0", "2.0", "1.1", "3.0", "3.1", "0.1", "2.1"]
        assert self.order(sizes, zeroed="02") == order

    def test_several_copies(self) -> None:
        """The first copies of all tensors precede the second ones."""
        specs = parts_of(source(), self.WHOLE, 1000)
        again = [replace(spec, name=f"{spec.name}+") for spec in specs if spec.name.endswith("1")]
        (shard,) = shards_of([*specs, *again], 10**9, BLOCK)
        names = [spec.name.removeprefix("model.") for spec in shard.specs]
        assert names[3:] == ["0.1", "1.1", "2.1", "0.1+", "1.1+", "2.1+"]

    @given(
        sizes=st.lists(
            st.tuples(st.just("BF16"), st.sampled_from([100, 2048, 4096, 6144])), min_size=1
        ),
        missing=st.sets(st.integers(0, 8)),
    )
    def test_offsets_are_kept(self, sizes: list[tuple[str, int]], missing: set[int]) -> None:
        """Originals and copies of whole blocks keep their offset, unless the base has more."""
        specs = parts_of(source(), sizes, 1000)
        kept = [spec for i, spec in enumerate(specs) if i // 2 not in missing or i % 2 == 0]
        (shard,) = shards_of(kept, 10**9, BLOCK)
        offset = len(shard.header())
        for spec in shard.specs:
            if spec.name.endswith("0") or spec.nbytes % BLOCK == 0:
                assert (offset - spec.tensor.start) % BLOCK == 0
            offset += spec.nbytes


def test_constants_fill_a_tensor() -> None:
    """A constant fills its tensor with the bytes of its dtype."""
    (spec, _) = parts_of(source(), [("F32", 6)], 8)
    constant = Constant(1.5, "x")
    filled = TensorSpec(
        spec.name, MODEL, spec.source, spec.tensor, None, "F32", "F32", (6,), 24, constant=constant
    )
    (shard,) = shards_of([filled], 10**9, BLOCK)
    header = shard.header()
    (step,) = [s for s in shard.steps(len(header), lambda _: True) if s.length]
    assert (step.how, step.at, step.length) == ("fill", len(header), 24)
    assert step.data == struct.pack("<f", 1.5)
