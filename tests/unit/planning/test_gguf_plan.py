"""Plans of grown GGUF models: tensors, metadata, and what llama.cpp would misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import add_keys, make_gguf
from hypothesis import given
from hypothesis import strategies as st

import mergekit_interleave as api
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.growth import stack_of
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import InterleaveError, LayoutError, RefusedError
from mergekit_interleave.gguf import header, values
from mergekit_interleave.layout.layout import expand
from mergekit_interleave.planning import gguf_metadata
from mergekit_interleave.planning.gguf_plan import GgufPlan, plan_gguf
from mergekit_interleave.planning.resolve import resolve


def planned(directive: str, file: Path | None = None, **how: Any) -> GgufPlan:
    """Plan a directive on a file, unless it names its models."""
    model = "" if file is None else f", model: {file}"
    wanted = directives.parse(f"{directive}{model}", "test")
    return plan_gguf(resolve(wanted, Models(), strict=True, **how))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Return a model of 4 layers."""
    return make_gguf(tmp_path / "toy.gguf")


def value(plan: GgufPlan, key: str) -> Any:
    """Return a value of the metadata of a result."""
    return plan.metadata[key].decoded()


class TestTensors:
    """The tensors of a result."""

    def test_identities(self, toy: Path) -> None:
        """New layers have zeros in the residual writers, and copies of everything else."""
        plan = planned("interleave: every 2", toy)
        assert plan.identities == {2, 5}
        assert plan.is_identity
        zeroed = {spec.name for spec in plan.specs if spec.scale == 0}
        assert zeroed == {
            f"blk.{i}.{n}.weight" for i in (2, 5) for n in ("attn_output", "ffn_down")
        }
        names = [spec.name for spec in plan.specs]
        assert len(names) == len({*names}) == 3 + 6 * 9
        assert plan.new_parameters * 6 < plan.parameters * 2

    def test_blocks_behind_the_layers(self, tmp_path: Path) -> None:
        """Blocks that predict further tokens stay behind the layers."""
        file = make_gguf(tmp_path / "a.gguf", layers=5, keys={"nextn_predict_layers": 1})
        plan = planned("append: 2", file)
        sources = {spec.name: spec.source for spec in plan.specs}
        assert sources["blk.6.attn_q.weight"] == "blk.4.attn_q.weight"
        assert sources["blk.5.attn_q.weight"] == "blk.3.attn_q.weight"
        assert value(plan, "llama.block_count") == 7

    def test_biases_are_zeroed_too(self, tmp_path: Path) -> None:
        """A bias of a residual writer is zeroed with its weight."""
        file = make_gguf(tmp_path / "a.gguf", extra=lambda _: {"attn_output.bias": (64,)})
        plan = planned("append: 1", file)
        assert any(s.name == "blk.4.attn_output.bias" and s.scale == 0 for s in plan.specs)

    def test_scaled_floats(self, toy: Path) -> None:
        """Plain floats can be scaled."""
        plan = planned("repeat: [1, 2], scale: {attn_q: 0.5}", toy)
        assert {spec.name for spec in plan.specs if spec.is_computed} == {"blk.2.attn_q.weight"}

    def test_scaled_quantized_tensors(self, tmp_path: Path) -> None:
        """Quantized tensors cannot be scaled."""
        file = make_gguf(tmp_path / "a.gguf", kind="Q8_0")
        with pytest.raises(RefusedError, match="Q8_0"):
            planned("repeat: [1, 2], scale: {attn_q: 0.5}", file)
        planned("repeat: [1, 2], scale: {attn_norm: 0.5}", file)

    def test_norms(self, tmp_path: Path) -> None:
        """`zero: norms` zeroes the norms behind the projections."""
        file = make_gguf(
            tmp_path / "a.gguf",
            architecture="olmo2",
            extra=lambda _: {"post_attention_norm": (64,), "post_ffw_norm": (64,)},
        )
        plan = planned("append: 1, zero: norms", file)
        zeroed = {spec.name for spec in plan.specs if spec.scale == 0}
        assert zeroed == {"blk.4.post_attention_norm.weight", "blk.4.post_ffw_norm.weight"}
        assert plan.is_identity

    def test_constants(self, tmp_path: Path) -> None:
        """A factor of the whole residual stream is set to 1 in an identity."""
        file = make_gguf(
            tmp_path / "a.gguf",
            architecture="gemma4",
            keys={"attention.sliding_window_pattern": [True, False, True, False]},
            extra=lambda _: {
                "post_attention_norm": (64,), "post_ffw_norm": (64,), "layer_output_scale": (1,),
            },
        )  # fmt: skip
        plan = planned("append: 1", file)
        (filled,) = [spec for spec in plan.specs if spec.constant is not None]
        assert filled.name == "blk.4.layer_output_scale.weight"
        assert plan.is_identity
        assert value(plan, "gemma4.attention.sliding_window_pattern") == [True, False] * 2 + [False]

    @pytest.mark.parametrize(
        "zero", ["[attn_output]", "[o_proj, down_proj]", "[attn_output, ffn]", "norms"]
    )
    def test_wrong_names(self, zero: str, toy: Path) -> None:
        """Names that match nothing, or do not make an identity, are refused."""
        with pytest.raises(LayoutError):
            planned(f"interleave: every 2, zero: {zero}" if zero != "[attn_output, ffn]" else
                    "interleave: every 2, zero: [attn_output, ffx]", toy)  # fmt: skip

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        """Without names, an unknown architecture is refused; with them, nothing is claimed."""
        file = make_gguf(tmp_path / "a.gguf", architecture="newer")
        with pytest.raises(LayoutError) as raised:
            planned("interleave: every 2", file)
        assert "zero: [" in (raised.value.hint or "")
        for plain in ("repeat: [1, 3]", "drop: [1, 2]"):
            with pytest.raises(RefusedError):
                planned(plain, file)
            assert planned(f"{plain}, zero: none", file).warnings
        plan = planned("interleave: every 2, zero: [attn_output, ffn_down]", file)
        assert not plan.identities
        assert not plan.is_identity
        assert any("newer" in warning for warning in plan.warnings)


class TestMetadata:
    """The metadata of a result."""

    def test_what_is_derived_again(self, toy: Path) -> None:
        """Depth, name and size are those of the result; all else stays, to the byte."""
        plan = planned("repeat: [1, 3]", toy)
        assert value(plan, "llama.block_count") == 6
        assert value(plan, "general.name") == "Toy 6L"
        assert value(plan, "general.size_label") != "71K"
        changed = {key for key, _ in plan.changed_metadata()}
        assert changed == {"llama.block_count", "general.name", "general.size_label"}

    def test_growing_again(self) -> None:
        """The depth in a name is replaced when the model is grown again."""
        assert gguf_metadata._without_depth("Toy 6L") == "Toy"  # noqa: SLF001
        assert gguf_metadata._without_depth("6L") == "6L"  # noqa: SLF001

    def test_arrays(self, tmp_path: Path) -> None:
        """Arrays with an entry per layer follow their layers."""
        keys = {"feed_forward_length": [64, 96, 128, 160], "attention.head_count_kv": [2, 2, 1, 1]}
        plan = planned("repeat: [1, 3]", make_gguf(tmp_path / "a.gguf", keys=keys))
        assert value(plan, "llama.feed_forward_length") == [64, 96, 96, 128, 128, 160]
        assert value(plan, "llama.attention.head_count_kv") == [2, 2, 2, 1, 1, 1]

    def test_arrays_of_constants(self, tmp_path: Path) -> None:
        """Arrays whose keys have no prefix follow their layers, too."""
        keys = {"xielu.alpha_n": [0.5, 1.0, 1.5, 2.0]}
        file = make_gguf(tmp_path / "a.gguf", architecture="apertus", keys=keys)
        assert value(planned("drop: [1, 2]", file), "xielu.alpha_n") == [0.5, 1.5, 2.0]

    def test_an_array_of_another_length(self, tmp_path: Path) -> None:
        """An array that should have an entry per layer, and has not, is refused."""
        file = make_gguf(tmp_path / "a.gguf", keys={"feed_forward_length": [64, 64, 64]})
        with pytest.raises(RefusedError, match="feed_forward_length"):
            planned("append: 1", file)

    def test_an_array_of_the_layers_only(self, tmp_path: Path) -> None:
        """An array may leave out the blocks behind the layers; an unknown one is refused, too."""
        keys = {"nextn_predict_layers": 1, "xielu.eps": [0.1, 0.2, 0.3]}
        file = make_gguf(tmp_path / "a.gguf", architecture="apertus", keys=keys)
        found = value(planned("repeat: [1, 2]", file), "xielu.eps")
        assert [round(number, 6) for number in found] == [0.1, 0.2, 0.2, 0.3]
        keys = {"nextn_predict_layers": 1, "new.array": [1, 2, 3]}
        with pytest.raises(RefusedError, match=r"new\.array"):
            planned("append: 1", make_gguf(tmp_path / "b.gguf", keys=keys))

    def test_a_result_without_windows(self, tmp_path: Path) -> None:
        """A result of which no layer has the window is refused, since llama.cpp loads none."""
        keys = {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False, True, False],
        }
        file = make_gguf(tmp_path / "a.gguf", architecture="mimo2", keys=keys)
        planned("drop: [0, 1]", file)
        with pytest.raises(RefusedError, match="window"):
            planned("stack: [[1, 2], [3, 4]]", file)

    def test_an_unknown_array(self, tmp_path: Path) -> None:
        """An unknown array as long as the depth is refused; of another length, it stays."""
        file = make_gguf(tmp_path / "a.gguf", keys={"new.array": [1, 2, 3, 4]})
        with pytest.raises(RefusedError, match=r"new\.array"):
            planned("append: 1", file)
        file = make_gguf(tmp_path / "b.gguf", keys={"new.array": [1, 2, 3]})
        assert value(planned("append: 1", file), "llama.new.array") == [1, 2, 3]

    def test_an_array_that_is_not_of_layers(self, tmp_path: Path) -> None:
        """The sections of a rope are as many as the layers by chance only."""
        file = make_gguf(tmp_path / "a.gguf", keys={"rope.dimension_sections": [1, 2, 3, 4]})
        assert value(planned("append: 1", file), "llama.rope.dimension_sections") == [1, 2, 3, 4]

    def test_leading_layers(self, tmp_path: Path) -> None:
        """The count of leading layers is that of the result; they must stay the first ones."""
        file = make_gguf(
            tmp_path / "a.gguf", architecture="deepseek", keys={"leading_dense_block_count": 1}
        )
        key = "deepseek.leading_dense_block_count"
        assert value(planned("repeat: [0, 2], zero: none", file), key) == 2
        assert value(planned("drop: [0, 1]", file), key) == 0
        assert value(planned("append: 2", file), key) == 1
        with pytest.raises(RefusedError, match="leading"):
            planned("stack: [[0, 4], [0, 4]]", file)

    def test_the_alignment(self, tmp_path: Path) -> None:
        """The largest alignment of the sources is kept."""
        file = make_gguf(tmp_path / "a.gguf", alignment=4096)
        assert value(planned("append: 1", file), "general.alignment") == 4096

    @pytest.mark.parametrize(
        ("count", "label"),
        [(134_515_008, "135M"), (1_235_000_000, "1.2B"), (999, "1.0K"), (8_030_261_248, "8.0B"),
         (70_000_000_000, "70B"), (2_000_000_000_000, "2.0T")],
    )  # fmt: skip
    def test_sizes(self, count: int, label: str) -> None:
        """A size is rounded as gguf-py rounds it."""
        import gguf.utility

        assert gguf_metadata._rounded(count) == label  # noqa: SLF001
        assert gguf.utility.size_label(count, count, 0, 0) == label


class TestKinds:
    """Kinds of layers that llama.cpp derives from their indices."""

    @pytest.mark.parametrize(
        ("architecture", "layers", "keys"),
        [
            ("gemma2", 8, {}),
            ("gemma3", 12, {"attention.sliding_window": 8}),
            ("gpt-oss", 8, {}),
            ("smollm3", 8, {}),
            ("llama4", 8, {"interleave_moe_layer_step": 1}),
            ("llama4", 8, {"interleave_moe_layer_step": 2}),
            ("cohere2", 8, {}),
            ("qwen3next", 8, {"full_attention_interval": 4}),
            ("qwen35", 8, {}),
            ("smallthinker", 8, {"attention.sliding_window": 8}),
            ("exaone4", 64, {}),
            ("gemma3", 12, {"attention.sliding_window": 8, "attention.sliding_window_pattern": 3}),
        ],
        ids=str,
    )
    def test_a_broken_period(
        self, architecture: str, layers: int, keys: dict[str, Any], tmp_path: Path
    ) -> None:
        """A layout that moves a layer to another place in its period is refused, with another."""
        file = make_gguf(tmp_path / "a.gguf", architecture=architecture, layers=layers, keys=keys)
        with pytest.raises(RefusedError) as raised:
            planned("interleave: after [0], zero: [attn_output, ffn_down]", file)
        if architecture != "exaone4":  # it has such layers only in 64 layers
            offered = (raised.value.hint or "").partition("period: ")[2]
            assert len(planned(offered, file).layout) > layers

    @pytest.mark.parametrize(
        ("architecture", "layers", "keys"),
        [
            ("llama", 8, {}),
            ("gemma3", 8, {}),  # without a window all layers are of one kind
            ("exaone4", 8, {}),
            ("qwen35", 8, {"attention.recurrent_layers": [True] * 8}),
            ("gemma3", 8, {"attention.sliding_window": 8,
                           "attention.sliding_window_pattern": [True, False] * 4}),
            ("llama4", 8, {"attention.sliding_window_pattern": [True] * 8}),
        ],
        ids=str,
    )  # fmt: skip
    def test_no_period(
        self, architecture: str, layers: int, keys: dict[str, Any], tmp_path: Path
    ) -> None:
        """Where a file states the kinds, or there are none, any layout is accepted."""
        file = make_gguf(tmp_path / "a.gguf", architecture=architecture, layers=layers, keys=keys)
        if architecture == "llama4":  # it leaves out the rope of every fourth layer, too
            with pytest.raises(RefusedError):
                planned("interleave: after [0], zero: [attn_output, ffn_down]", file)
        else:
            planned("interleave: after [0], zero: [attn_output, ffn_down]", file)

    def test_identities_of_either_kind(self, tmp_path: Path) -> None:
        """An identity may be of either kind, unless the kind decides which tensors it has."""
        for architecture, accepted in (("smollm3", True), ("gemma2", True), ("qwen35", False)):
            file = make_gguf(tmp_path / f"{architecture}.gguf", architecture=architecture, layers=8)
            if accepted:
                assert planned("append: 1", file).is_identity
                with pytest.raises(RefusedError):
                    planned("append: 1, zero: none", file)
            else:
                with pytest.raises(RefusedError):
                    planned("append: 1", file)

    @given(ranges=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), min_size=1, max_size=5))
    def test_what_is_accepted_keeps_every_kind(self, ranges: list[tuple[int, int]]) -> None:
        """In an accepted layout each layer has the kind of its source."""
        growth = stack_of([(start, min(start + length, 8)) for start, length in ranges])
        ref = ModelRef(ModelPath("model"))
        try:
            layout = expand(growth, ref, 8)
        except InterleaveError:
            return
        period = gguf_metadata.Period(4)
        kinds = [period.is_other(layer.source) for layer in layout.layers]
        same = all(kind == period.is_other(i) for i, kind in enumerate(kinds))
        sources: Any = {ref: _Base((period,))}
        assert (gguf_metadata.misread(layout, sources) is None) == same

    @pytest.mark.parametrize(
        ("architecture", "layers", "keys", "refused"),
        [
            ("minicpm3", 4, {}, True),
            ("minicpm", 4, {}, True),
            ("minicpm", 4, {"residual_scale": 0.5}, False),
            ("command-r", 63, {}, True),
            ("command-r", 60, {}, False),
            ("baichuan", 32, {}, True),
            ("llama", 512, {}, True),
            ("llama", 511, {}, False),
        ],
        ids=str,
    )
    def test_depths(
        self, architecture: str, layers: int, keys: dict[str, Any], refused: bool, tmp_path: Path
    ) -> None:
        """A depth with which llama.cpp computes something else, or loads nothing, is refused."""
        file = make_gguf(
            tmp_path / "a.gguf", architecture=architecture, layers=layers, keys=keys, hidden=32
        )
        if refused:
            with pytest.raises(RefusedError):
                planned("append: 1", file)
        else:
            planned("append: 1", file)

    def test_a_first_layer_of_its_own(self, tmp_path: Path) -> None:
        """A first layer whose result the others use is neither moved nor copied."""
        file = make_gguf(tmp_path / "a.gguf", architecture="rwkv7")
        zero = "zero: none"
        planned(f"interleave: after [1], {zero}", file)
        for layout in ("interleave: after [0]", "stack: [[1, 3], [0, 4]]", "repeat: [0, 2]"):
            with pytest.raises(RefusedError, match="first layer"):
                planned(f"{layout}, {zero}", file)

    def test_pinned_layers(self, tmp_path: Path) -> None:
        """Layers to which something is added by their index keep their places."""
        file = make_gguf(
            tmp_path / "a.gguf", architecture="qwen3vl", keys={"n_deepstack_layers": 2}
        )
        plan = planned("interleave: after [1, 2]", file)
        assert value(plan, "qwen3vl.n_deepstack_layers") == 2
        with pytest.raises(RefusedError, match="n_deepstack_layers"):
            planned("interleave: after [0]", file)

    def test_sizes_of_the_first_layer(self, tmp_path: Path) -> None:
        """Another first layer must have the sizes that llama.cpp takes from it."""
        keys = {"attention.head_count_kv": [2, 0, 2, 0]}
        file = make_gguf(tmp_path / "a.gguf", architecture="jamba", keys=keys)
        planned("drop: [0, 2]", file)
        with pytest.raises(RefusedError, match="head_count_kv"):
            planned("drop: [0, 1]", file)

    def test_an_empty_last_layer(self, tmp_path: Path) -> None:
        """The last layer must not be one that llama.cpp skips."""
        keys = {"feed_forward_length": [64, 64, 0, 64]}
        file = make_gguf(tmp_path / "a.gguf", architecture="deci", keys=keys)
        planned("append: 1", file)
        with pytest.raises(RefusedError, match="last layer"):
            planned("drop: [3, 4]", file)


class _Base:
    """A model whose architecture has some periods."""

    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, periods: tuple[gguf_metadata.Period, ...]) -> None:
        self.architecture = type("Facts", (), {"periods": periods})
        self.depth = 8

    def key(self, name: str) -> str:
        return name


def _stacked(first: Path, second: Path) -> str:
    """Return a directive of two models, one after the other."""
    return f"layout: [{{model: {first}, layers: [0, 4]}}, {{model: {second}, layers: [0, 4]}}]"


class TestSeveral:
    """Stacks of several GGUF files."""

    def both(self, tmp_path: Path, **other: Any) -> str:
        """Return a directive of two models."""
        one = make_gguf(tmp_path / "one.gguf", seed=1)
        two = make_gguf(tmp_path / "two.gguf", seed=2, **other)
        return f"layout: [{{model: {one}, layers: [0, 4]}}, {{model: {two}, layers: [1, 4]}}]"

    def test_a_stack(self, tmp_path: Path) -> None:
        """Embeddings come from the first model, the head from the last."""
        plan = planned(self.both(tmp_path))
        first, second = plan.layout.models
        origin = {spec.name: spec.model for spec in plan.specs}
        assert origin["token_embd.weight"] == first
        assert origin["output.weight"] == second
        assert [plan.title(model) for model in (first, second)] == ["one.gguf", "two.gguf"]

    @pytest.mark.parametrize(
        "other",
        [{"hidden": 128}, {"architecture": "qwen2"}, {"tied": True},
         {"keys": {"rope.freq_base": 1e6}}],
        ids=str,
    )  # fmt: skip
    def test_models_that_do_not_fit(self, other: dict[str, Any], tmp_path: Path) -> None:
        """Another architecture, size or rope is refused, and a head that would be missing."""
        with pytest.raises(RefusedError) as raised:
            planned(self.both(tmp_path, **other))
        assert "two.gguf" in str(raised.value)

    def test_arrays_of_both(self, tmp_path: Path) -> None:
        """The entries of each layer come from its own model; a single value is that of each."""
        keys = {"feed_forward_length": [32, 96, 128, 160]}
        plan = planned(self.both(tmp_path, keys=keys))
        found = value(plan, "llama.feed_forward_length")
        assert found == [64, 64, 64, 64, 96, 128, 160]

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            ({"attention.head_count": 4}, {"attention.head_count": 8}),
            ({"expert_used_count": 2}, {"expert_used_count": 4}),
            ({}, {"expert_used_count": 4}),
            ({"leading_dense_block_count": 1}, {}),
            ({}, {"leading_dense_block_count": 1}),
            ({"attention.sliding_window_pattern": 2}, {"attention.sliding_window_pattern": 3}),
            ({"attention.sliding_window_pattern": 2},
             {"attention.sliding_window_pattern": [True, False] * 2}),
        ],
        ids=str,
    )  # fmt: skip
    def test_keys_that_differ(
        self, one: dict[str, Any], two: dict[str, Any], tmp_path: Path
    ) -> None:
        """Models that differ in a key that no array can join are refused, in both orders."""
        architecture = "deepseek" if "leading_dense_block_count" in {**one, **two} else "gemma2"
        files = [
            make_gguf(tmp_path / f"{i}.gguf", architecture=architecture, keys=keys)
            for i, keys in enumerate((one, two))
        ]
        for first, second in (files, files[::-1]):
            with pytest.raises(RefusedError):
                planned(_stacked(first, second))

    def test_tables_of_the_rope(self, tmp_path: Path) -> None:
        """Models of which one has a table of the rope are refused, in both orders."""
        one, two = (make_gguf(tmp_path / f"{name}.gguf") for name in ("one", "two"))
        found, data = header.read(two), two.read_bytes()
        entries = [header.Entry(n, t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()]
        entries.append(header.Entry("rope_freqs.weight", "F32", (8,), 32))
        head = header.encode(found.metadata, entries, found.version)
        two.write_bytes(head + data[found.start :] + bytes(64))
        for first, second in ((one, two), (two, one)):
            with pytest.raises(RefusedError, match="rope_freqs"):
                planned(_stacked(first, second))

    def test_depths_of_all(self, tmp_path: Path) -> None:
        """A rule about the number of layers holds for every source."""
        one = make_gguf(tmp_path / "one.gguf", architecture="minicpm", layers=4)
        two = make_gguf(tmp_path / "two.gguf", architecture="minicpm", layers=8)
        with pytest.raises(RefusedError, match="depends on the number"):
            planned(f"layout: [{{model: {one}, layers: [0, 2]}}, {{model: {two}, layers: [6, 8]}}]")

    def test_two_spellings(self, tmp_path: Path) -> None:
        """Two spellings of a file are one model, whose second occurrences are copies."""
        one = make_gguf(tmp_path / "one.gguf")
        (tmp_path / "link.gguf").symlink_to(one)
        other = tmp_path / "link.gguf"
        plan = planned(
            f"layout: [{{model: {one}, layers: [0, 4]}}, {{model: {other}, layers: [2, 4]}}]"
        )
        assert [layer.index for layer in plan.layout.new_layers] == [4, 5]
        assert list(plan.sources) == list(plan.layout.models)

    def test_a_base_without_layers(self, tmp_path: Path) -> None:
        """The metadata must be that of a model of the layers, under any spelling."""
        one, two = (make_gguf(tmp_path / f"{name}.gguf") for name in ("one", "two"))
        (tmp_path / "link.gguf").symlink_to(one)
        planned(f"append: 1, base_model: {tmp_path / 'link.gguf'}", one)
        with pytest.raises(RefusedError, match="base_model"):
            planned(f"append: 1, base_model: {two}", one)

    def test_a_directory_among_them(self, tiny: Path, tmp_path: Path) -> None:
        """A directory cannot be stacked with a GGUF file."""
        one = make_gguf(tmp_path / "one.gguf")
        with pytest.raises(RefusedError, match="GGUF"):
            planned(
                f"layout: [{{model: {one}, layers: [0, 4]}}, {{model: {tiny}, layers: [0, 4]}}]"
            )


@pytest.mark.parametrize("key", ["dtype: bfloat16", "tokenizer_source: base", "chat_template: x"])
def test_keys_of_mergekit(key: str, toy: Path) -> None:
    """Keys that only mergekit applies are refused."""
    with pytest.raises(RefusedError):
        planned(f"append: 1, {key}", toy)


def test_what_is_stated_of_single_tensors(toy: Path) -> None:
    """An array of names of tensors, and one of their properties, follow the layers."""
    names = ["blk.1.attn_q.weight", "output.weight", "blk.3.attn_q.weight"]
    keys = {
        "general.tensor_extra.name": values.texts(names),
        "general.tensor_extra.prec_a4": values.array(values.BOOL, [b"\1", b"\0", b"\0"]),
    }
    plan = planned("repeat: [1, 2]", add_keys(toy, keys))
    found = value(plan, "general.tensor_extra.name")
    properties = value(plan, "general.tensor_extra.prec_a4")
    assert dict(zip(found, properties, strict=True)) == {
        "blk.1.attn_q.weight": True,
        "blk.2.attn_q.weight": True,
        "blk.4.attn_q.weight": False,
        "output.weight": False,
    }


_HOSTILE = {
    "a text": values.text("many"),
    "a float": values.number(6, 1.5),
    "a negative number": values.number(5, -1),
    "not a number": values.number(6, float("nan")),
    "one byte": values.number(0, 4),
    "an array of texts": values.texts(["a", "b", "c", "d"]),
    "an array of arrays": values.array(values.ARRAY, [values.texts([]).data] * 4),
    "not UTF-8": values.Value(values.STRING, b"\2\0\0\0\0\0\0\0\xff\xfe"),
    "an empty array": values.array(4, []),
}

_KEYS = (
    "general.architecture", "general.name", "general.parameter_count", "general.size_label",
    "general.file_type", "general.license", "general.languages", "llama.block_count",
    "llama.nextn_predict_layers", "llama.attention.head_count", "llama.feed_forward_length",
    "llama.attention.sliding_window", "llama.leading_dense_block_count", "llama.vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("key", _KEYS)
@pytest.mark.parametrize("kind", _HOSTILE)
def test_hostile_metadata(key: str, kind: str, toy: Path, tmp_path: Path) -> None:
    """A value of the wrong type is refused, or what is written is verified and described."""
    file = add_keys(toy, {key: _HOSTILE[kind]})
    out = tmp_path / "out.gguf"
    try:
        api.plan("append: 1", model=file)
        api.run("append: 1", out, model=file)
    except InterleaveError:
        assert not out.exists()
        return
    assert api.verify(out, against=file).is_exact
    api.card(out)
    api.explain(out)


@pytest.mark.parametrize("key", ["block_count", "leading_dense_block_count"])
def test_a_count_that_does_not_fit(key: str, tmp_path: Path) -> None:
    """A count that is too large for its type is refused."""
    keys = {"leading_dense_block_count": 254}
    file = make_gguf(tmp_path / "a.gguf", architecture="deepseek", layers=254, hidden=32, keys=keys)
    add_keys(file, {f"deepseek.{key}": values.number(0, 254)})
    with pytest.raises(RefusedError, match=key):
        planned("append: 3", file)
