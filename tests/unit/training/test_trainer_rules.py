"""Each trainer's own rule for names, in cases that differ from the obvious rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mergekit_interleave.training.trainers import axolotl, llamafactory, ms_swift

LAYERS = [f"model.layers.{index}.self_attn.q_proj" for index in range(50)]
TOWER = [f"model.vision_tower.encoder.layers.{index}.self_attn.q_proj" for index in range(50)]
WEIGHTS = [f"{name}.weight" for name in LAYERS]


def indices(names: set[str]) -> list[int]:
    """Return the layers of some names."""
    return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})


class TestAxolotl:
    """Tests of `unfrozen_parameters`."""

    @pytest.mark.parametrize(
        ("pattern", "layers"),
        [
            ("model.layers.4.", [4]),
            ("model.layers.(4|14).", [4, 14]),
            (".+layers.(4|14).", [4, 14]),
            ("model.layers.4", [4, *range(40, 50)]),
            ("layers.4.", []),
        ],
    )
    def test_patterns(self, pattern: str, layers: list[int]) -> None:
        """A pattern is matched from the start of a name, and its dots match only dots."""
        assert indices(axolotl.trained_parameters(WEIGHTS, [pattern])) == layers

    def test_towers(self) -> None:
        """`.+` also matches the prefix of a tower's layers."""
        tower = [f"{name}.weight" for name in TOWER]
        assert axolotl.trained_parameters(tower, [".+layers.(4|14)."])
        assert not axolotl.trained_parameters(tower, ["model.layers.(4|14)."])


class TestLlamaFactory:
    """Tests of the freeze mode and `lora_target`."""

    def test_llama_pro_trains_what_its_expander_inserts(self) -> None:
        """The freeze mode trains the layers that LLaMA Pro's script inserts after each group."""
        for depth in range(1, 97):
            for count in (n for n in range(1, depth + 1) if depth % n == 0):
                stride = depth // count
                inserted = [group * (stride + 1) + stride for group in range(count)]
                found = llamafactory.freeze_mode_layers(depth + count, count, llama_pro=True)
                assert list(found) == inserted

    @pytest.mark.parametrize(
        ("depth", "count", "llama_pro", "layers"),
        [
            (49, 2, True, ()),
            (40, 8, True, (4, 9, 14, 19, 24, 29, 34, 39)),
            (8, 2, False, (6, 7)),
            (8, -2, False, (0, 1)),
            (8, -2, True, ()),
            (2, 9, False, (0, 1)),
        ],
    )
    def test_other_layers(
        self, depth: int, count: int, *, llama_pro: bool, layers: tuple[int, ...]
    ) -> None:
        """It trains the last layers, the first, or none if the count does not divide the depth."""
        assert llamafactory.freeze_mode_layers(depth, count, llama_pro=llama_pro) == layers

    def test_it_searches_the_whole_name(self) -> None:
        """The index 4 also matches layer 4 of a tower and expert 4."""
        odd = ["model.layers.7.mlp.experts.4.w1.weight", f"{TOWER[4]}.weight"]
        found = llamafactory.trained_parameters([*WEIGHTS, *odd], [4])
        assert found == {WEIGHTS[4], *odd}
        assert llamafactory.adapted_modules(LAYERS, ["4.self_attn.q_proj"]) == {
            LAYERS[index] for index in (4, 14, 24, 34, 44)
        }

    def test_layer_count(self) -> None:
        """The layer count is read from any of three keys, with the text model's keys first."""
        assert llamafactory.layer_count(SimpleNamespace(n_layer=12)) == 12
        text = SimpleNamespace(num_hidden_layers=None, num_layers=8)
        assert llamafactory.layer_count(SimpleNamespace(text_config=text, n_layer=3)) == 8
        assert llamafactory.layer_count(SimpleNamespace()) is None

    def test_known_modules(self) -> None:
        """The known modules are those of layers 0 and 1."""
        names = ["model.layers.0.mlp.up.weight", "h.1.attn.q", "h.2.moe.w", "model.norm.weight"]
        assert llamafactory.known_modules(names) == {"mlp", "attn"}


def test_ms_swift() -> None:
    """A prefix without its last dot also matches layers 40 to 49."""
    assert indices(ms_swift.trained_parameters(WEIGHTS, ["model.layers.4."])) == [4]
    without = ms_swift.trained_parameters(WEIGHTS, ["model.layers.4"])
    assert indices(without) == [4, *range(40, 50)]
