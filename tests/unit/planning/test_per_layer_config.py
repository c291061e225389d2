"""Per-layer settings of config.json are derived for the new layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.architectures import family as families
from mergekit_interleave.directive.growth import Append, Every, Growth, Repeat, stack_of
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import zeroed_scales
from mergekit_interleave.errors import UnrepresentableError
from mergekit_interleave.layout.layout import Constant, Edit, expand
from mergekit_interleave.planning.per_layer_config import Placement, SourceConfig, place

MODEL = ModelRef(ModelPath("m"))
DEPTH = 8
ZEROED = Edit(
    zeroed_scales(["o_proj", "down_proj", "per_layer_projection."]), (Constant(1, "layer_scalar"),)
)


def placed(
    model_type: str, config: Mapping[str, Any], growth: Growth, edit: Edit | None = ZEROED
) -> Placement:
    """Return the per-layer settings after growth; by default new layers are identities."""
    family = families.family_of(model_type)
    assert family is not None
    source = SourceConfig(config, family, DEPTH, lambda _: None)
    return place({MODEL: source}, expand(growth, MODEL, DEPTH, edit and (lambda _: edit)))


class TestPeriods:
    """Tests of keys that place layers at regular distances."""

    JAMBA: Mapping[str, Any] = {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }

    def test_groups_at_the_same_place_in_each_period(self) -> None:
        """A period of 4 becomes 6, and experts stay at every second layer."""
        growth = stack_of([(0, 2), (0, 6), (4, 8)])
        config = placed("jamba", self.JAMBA, growth).config
        assert (config["attn_layer_period"], config["attn_layer_offset"]) == (6, 4)
        sources = [0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
        for name in ("attn", "expert"):
            period, offset = (f"{name}_layer_{word}" for word in ("period", "offset"))
            now = [i % config[period] == config[offset] for i in range(12)]
            assert now == [s % self.JAMBA[period] == self.JAMBA[offset] for s in sources]

    @pytest.mark.parametrize("growth", [Every(2), Append(1), Repeat((3, 5))])
    def test_growth_that_breaks_a_period(self, growth: Growth) -> None:
        """A layout that breaks a period is refused, and the error names the keys."""
        with pytest.raises(UnrepresentableError, match="expert_layer_period, expert_layer_offset"):
            placed("jamba", self.JAMBA, growth)

    @given(st.integers(0, 7), st.integers(0, 7), st.integers(1, 8))
    def test_consecutive_experts_after_any_growth(self, start: int, length: int, n: int) -> None:
        """At interval 1, start and end move with their layers, whatever is copied."""
        end = min(start + length, 7)
        config = {
            "moe_layer_interval": 1,
            "moe_layer_start_index": start,
            "moe_layer_end_index": end,
        }
        now = placed("ernie4_5_moe", config, Every(n)).config
        sources = [layer.source for layer in expand(Every(n), MODEL, DEPTH).layers]
        for i, source in enumerate(sources):
            inside = now["moe_layer_start_index"] <= i <= now["moe_layer_end_index"]
            assert ((i + 1) % now["moe_layer_interval"] == 0 and inside) == (start <= source <= end)

    def test_an_end_of_minus_one(self) -> None:
        """An end of -1 becomes the index of the last layer."""
        config = {
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
        }
        now = placed("ernie4_5_moe", config, Append(2)).config
        assert now["moe_layer_end_index"] == 9

    def test_boundaries_are_at_originals(self) -> None:
        """Blocks of 4 layers become blocks of 6, and a boundary at a copy is refused."""
        key = "n_layers_per_attn_res_block"
        assert placed("inkling2_text", {key: 4}, Every(2)).config == {key: 6}
        with pytest.raises(UnrepresentableError, match=key):
            placed("inkling2_text", {key: 2}, Repeat((1, 2)))
        with pytest.raises(UnrepresentableError, match=r"first layer .*inkling2_text"):
            placed("inkling2_text", {key: 8}, Repeat((0, 1)))

    def test_halvings_follow_their_layers(self) -> None:
        """Each halving comes after the last copy of its layer, and 0 means none."""
        assert placed("rwkv", {"rescale_every": 2}, Every(2)).config == {"rescale_every": 3}
        assert placed("rwkv", {"rescale_every": 0}, Every(3)).config == {}
        with pytest.raises(UnrepresentableError, match="rescale_every"):
            placed("rwkv", {"rescale_every": 2}, Every(3))


class TestLending:
    """Tests of layers that use results of an earlier layer."""

    TYPES = ("full", "full", "shared", "shared", "full", "shared", "shared", "full")

    def test_a_copy_between_lender_and_borrowers_borrows(self) -> None:
        """A copy after the lender becomes a borrower, because it has another input."""
        result = placed("hy_v4", {"indexer_types": [*self.TYPES]}, Repeat((1, 2)))
        assert result.kv_sharing_layers == {2}
        assert result.config["indexer_types"][:4] == ["full", "full", "shared", "shared"]

    def test_a_copy_without_borrowers_is_unchanged(self) -> None:
        """A copy before another lender or after all borrowers is unchanged."""
        for growth in (Repeat((0, 1)), Append(2)):
            result = placed("hy_v4", {"indexer_types": [*self.TYPES]}, growth)
            assert not result.kv_sharing_layers

    def test_plain_copies_are_unchanged(self) -> None:
        """A plain copy is unchanged, because it need not be an identity."""
        result = placed("hy_v4", {"indexer_types": [*self.TYPES]}, Repeat((1, 2)), None)
        assert not result.kv_sharing_layers


class TestSharedTail:
    """Tests of last layers that use the keys and values of an earlier layer of their type."""

    CONFIG: Mapping[str, Any] = {
        "num_kv_shared_layers": 3,
        "layer_types": ["s", "f", "s", "f", "s", "s", "f", "s"],
    }

    def test_copies_of_ordinary_layers_and_of_sharers(self) -> None:
        """The count of sharing layers grows only with copies of these layers."""
        assert (
            placed("gemma4_text", self.CONFIG, Repeat((0, 2))).config["num_kv_shared_layers"] == 3
        )
        result = placed("gemma4_text", self.CONFIG, Repeat((6, 8)))
        assert result.config["num_kv_shared_layers"] == 5
        assert not result.kv_sharing_layers

    def test_a_copy_of_the_last_lender_shares_too(self) -> None:
        """A copy of the last lender shares its keys and values."""
        result = placed("gemma4_text", self.CONFIG, Repeat((4, 5)))
        assert result.config["num_kv_shared_layers"] == 4
        assert result.kv_sharing_layers == {5}

    def test_a_copy_of_another_lender_is_refused(self) -> None:
        """A copy of another lender is refused, and the key and the lenders are named."""
        with pytest.raises(UnrepresentableError, match=r"num_kv_shared_layers .*\b3 and 4\b"):
            placed("gemma4_text", self.CONFIG, Repeat((3, 4)))

    @pytest.mark.parametrize(
        "growth",
        [Repeat((2, 5), as_block=True), Repeat((1, 4), as_block=True), stack_of([(0, 5), (0, 8)])],
    )
    def test_copies_between_lender_and_sharers(self, growth: Growth) -> None:
        """A copy that would become the lender is refused."""
        with pytest.raises(UnrepresentableError, match="num_kv_shared_layers"):
            placed("gemma4_text", self.CONFIG, growth)

    def test_sharers_must_be_last(self) -> None:
        """A copy of a sharing layer at the start is refused."""
        with pytest.raises(UnrepresentableError, match=r"num_kv_shared_layers .*\blayer 6\b"):
            placed("gemma4_text", self.CONFIG, stack_of([(0, 2), (6, 7), (0, 8)]))


def test_settings_by_index() -> None:
    """A mapping from indices to settings follows its layers."""
    config = {"per_layer_config": {"1": {"head_dim": 8}, "7": {"head_dim": 4}}}
    result = placed("gemma4_text", config, Every(4)).config["per_layer_config"]
    assert result == {"1": {"head_dim": 8}, "8": {"head_dim": 4}, "9": {"head_dim": 4}}


def test_a_letter_for_each_layer() -> None:
    """A string with a letter per layer is treated as a list."""
    config = {"layers_block_type": ["m"] * 8, "hybrid_override_pattern": "M-M*M-M*"}
    result = placed("nemotron_h", config, Every(4)).config
    assert result["hybrid_override_pattern"] == "M-M**M-M**"


def test_entries_after_the_layers() -> None:
    """Entries after those of the layers stay at the end of the list."""
    config = {"compress_ratios": [1, 2, 3, 4, 5, 6, 7, 8, 99]}
    result = placed("deepseek_v4", config, Every(4)).config
    assert result["compress_ratios"] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 99]


def test_indices_that_count_from_one() -> None:
    """Indices that count from one follow their layers, and other keys stay."""
    config = {"linear_attn_config": {"full_attn_layers": [4, 8], "num_heads": 2}}
    result = placed("kimi_linear", config, Every(4)).config["linear_attn_config"]
    assert result == {"full_attn_layers": [4, 5, 9, 10], "num_heads": 2}


def test_a_count_past_the_last_layer_stays_past_it() -> None:
    """A count of all layers or more still includes all layers."""
    for stated, expected in ((8, 10), (28, 28), (4, 5)):
        config = {"max_window_layers": stated, "layer_types": ["a"] * 8}
        assert placed("qwen2", config, Every(4)).config["max_window_layers"] == expected


def test_runs_of_kinds() -> None:
    """Runs of layer types are derived from the list."""
    config = {"attention_layers": ["g", "l"] * 4, "attention_types": [[["g", "l"], 4]]}
    result = placed("gpt_neo", config, Repeat((0, 1))).config
    assert result["attention_types"][:3] == [[["g"], 1], [["g"], 1], [["l"], 1]]
    assert len(result["attention_types"]) == 9
