"""GGUF models: one file or splits, their layers, and what does not fit together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf_files import make_gguf, pair, raw, text

from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, InterleaveError, RefusedError
from mergekit_interleave.gguf.model import GgufModel, open_model, split_name, split_stem


def opened(path: Path) -> GgufModel:
    """Open a model."""
    return open_model(ModelRef(ModelPath(str(path))))


@pytest.fixture
def splits(tmp_path: Path) -> list[Path]:
    """Return the splits of a model that gguf-py wrote."""
    make_gguf(tmp_path / "toy.gguf", split_tensors=12)
    return sorted(tmp_path.glob("toy-*.gguf"))


class TestOneFile:
    """A model in one file."""

    def test_its_layers(self, tmp_path: Path) -> None:
        """Depth, architecture and the tensors of each layer are known."""
        model = opened(make_gguf(tmp_path / "a.gguf", layers=3))
        assert (model.depth, model.blocks, model.model_type) == (3, 3, "llama")
        assert len(model.layer_tensors(2)) == 9
        assert model.layer_of("blk.2.attn_q.weight") == 2
        assert model.layer_of("output.weight") is None
        assert model.renamed("blk.2.attn_q.weight", 11) == "blk.11.attn_q.weight"
        before, after = model.outside_layers()
        assert before == ["token_embd.weight"]
        assert after == ["output_norm.weight", "output.weight"]
        model.check_depth()

    def test_blocks_that_predict_further_tokens(self, tmp_path: Path) -> None:
        """Blocks behind the layers are no layers; they come after them."""
        keys = {"nextn_predict_layers": 1}
        model = opened(make_gguf(tmp_path / "a.gguf", layers=4, keys=keys))
        assert (model.depth, model.blocks) == (3, 4)
        assert "blk.3.attn_q.weight" in model.outside_layers()[1]
        model.check_depth()

    @pytest.mark.parametrize(
        "keys",
        [{"block_count": 5}, {"block_count": 3}, {"block_count": 0}, {"block_count": 10**6},
         {"block_count": [1, 2]}, {"nextn_predict_layers": 4}],
        ids=str,
    )  # fmt: skip
    def test_a_wrong_depth(self, keys: dict[str, object], tmp_path: Path) -> None:
        """A depth that is not that of the tensors is refused."""
        model = opened(make_gguf(tmp_path / "a.gguf", keys=keys))
        with pytest.raises(CheckpointError) as raised:
            model.check_depth() or model.depth
        assert "a.gguf" in str(raised.value)

    def test_no_architecture(self, tmp_path: Path) -> None:
        """A file without an architecture has no layers."""
        (tmp_path / "a.gguf").write_bytes(raw([], []))
        with pytest.raises(CheckpointError, match=r"general\.architecture"):
            opened(tmp_path / "a.gguf").depth  # noqa: B018 - a property

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        """An unknown architecture has no known residual writers."""
        model = opened(make_gguf(tmp_path / "a.gguf", architecture="newer"))
        assert model.family is None
        assert model.require_family().is_unknown

    @pytest.mark.parametrize("architecture", ["gemma3n", "bert", "hrm_text"])
    def test_a_refused_architecture(self, architecture: str, tmp_path: Path) -> None:
        """An architecture whose layers cannot be copied is refused with the reason."""
        model = opened(make_gguf(tmp_path / "a.gguf", architecture=architecture))
        with pytest.raises(RefusedError, match=architecture):
            model.require_family()

    def test_an_architecture_refused_by_a_key(self, tmp_path: Path) -> None:
        """A key can refuse a model; its zero does not."""
        for number, refused in ((0, False), (6, True)):
            file = make_gguf(
                tmp_path / f"{number}.gguf",
                architecture="rwkv7",
                keys={"rescale_every_n_layers": number},
            )
            if refused:
                with pytest.raises(RefusedError):
                    opened(file).require_family()
            else:
                opened(file).require_family()

    def test_a_type_whose_zero_is_unknown(self, tmp_path: Path) -> None:
        """A tensor is not zeroed if it is unknown that zero bytes mean zeros."""
        model = opened(make_gguf(tmp_path / "a.gguf"))
        assert model.zero_byte("blk.0.attn_q.weight") == 0
        kind = gguf.GGMLQuantizationType.Q1_0
        name = make_gguf(tmp_path / "b.gguf", kind=kind.name, hidden=128)
        with pytest.raises(RefusedError):
            opened(name).zero_byte("blk.0.attn_q.weight")

    def test_a_lora(self, tmp_path: Path) -> None:
        """A LoRA is not merged into a GGUF file."""
        file = make_gguf(tmp_path / "a.gguf")
        with pytest.raises(CheckpointError, match="LoRA"):
            open_model(ModelRef(ModelPath(str(file)), ModelPath("org/lora")))

    def test_its_origin(self, tmp_path: Path) -> None:
        """A file in the cache of the Hub has its Hub id and commit."""
        place = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
        place.mkdir(parents=True)
        model = opened(make_gguf(place / "a.gguf"))
        assert model.hub_origin == ModelPath("org/name", "a" * 40)
        assert opened(make_gguf(tmp_path / "a.gguf")).hub_origin is None


def test_names_of_splits() -> None:
    """Names of splits are those of llama.cpp."""
    assert split_name("model", 1, 12) == "model-00002-of-00012.gguf"
    assert split_stem("model-00002-of-00012.gguf") == "model"
    assert split_stem("model.gguf") is None
    assert split_stem("model-2-of-3.gguf") is None


def test_splits(splits: list[Path], tmp_path: Path) -> None:
    """Splits are read as the whole file is."""
    whole = opened(make_gguf(tmp_path / "whole.gguf"))
    model = opened(splits[0])
    assert len(model.files) == len(splits) == 4
    assert model.tensors.keys() == whole.tensors.keys()
    model.check_depth()


def _swap(files: list[Path]) -> None:
    first, second = files[1].read_bytes(), files[2].read_bytes()
    files[1].write_bytes(second)
    files[2].write_bytes(first)


WRONG: dict[str, Callable[[list[Path]], object]] = {
    "missing": lambda files: files[2].unlink(),
    "swapped": _swap,
    "the first one again": lambda files: shutil.copy(files[0], files[1]),
    "a cycle of links": lambda files: (files[1].unlink(), files[1].symlink_to(files[1].name)),
    "another file": lambda files: files[1].write_bytes(
        raw([pair(b"general.architecture", 8, text(b"llama"))], [])
    ),
    "cut short": lambda files: files[3].write_bytes(files[3].read_bytes()[:-100]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_splits(name: str, splits: list[Path]) -> None:
    """Splits that do not belong together are refused."""
    WRONG[name](splits)
    with pytest.raises(CheckpointError) as raised:
        opened(splits[0])
    assert splits[0].parent.name in str(raised.value)


def test_another_than_the_first_split(splits: list[Path]) -> None:
    """Another split than the first one is refused, and the first one is named."""
    with pytest.raises(CheckpointError) as raised:
        opened(splits[1])
    assert splits[0].name in (raised.value.hint or "")


def test_a_split_with_another_name(splits: list[Path]) -> None:
    """A split must have a name from which those of the others follow."""
    other = splits[0].rename(splits[0].with_name("other.gguf"))
    with pytest.raises(InterleaveError, match="split"):
        opened(other)
