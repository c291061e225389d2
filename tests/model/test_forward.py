"""`verify --forward` compares in numbers what both models compute."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, load_tensors, make_llama

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.output.verification_text import MOST_DIFFERENT
from mergekit_interleave.verification import forward


def grown(mk: Cli, base: Path, out: Path, directive: str) -> Path:
    """Run a directive by the stream engine and return OUT."""
    result = mk("run", directive, out, "--model", base, "--engine", "stream")
    assert result.status == 0, result.err
    return out


def measured(mk: Cli, base: Path, out: Path, *words: object, status: int = 0) -> Any:
    """Return the `forward` part of the report of `verify --forward --json`."""
    result = mk("verify", out, "--against", base, "--forward", "--json", *words)
    assert result.status == status, result.err
    return json.loads(result.out)["forward"]


class TestIdentity:
    """A model that must compute what its base computes."""

    def test_it_does(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """The report, interleave.json and the card state logits, greedy tokens and versions."""
        out = grown(mk, tiny, tmp_path / "out", "interleave: every 2")
        found = measured(mk, tiny, out)
        assert (found["exact"], found["largest_difference"]) == (True, 0)
        assert found["largest_logit"] > 0
        assert (found["greedy_tokens"], found["same_greedy_tokens"]) == (16, True)
        assert found["perplexity"] == found["base_perplexity"] > 1
        assert found["tools"].keys() == {"torch", "transformers"}
        content = json.loads((out / "interleave.json").read_text())
        assert content["verified"]["forward"] == found
        assert content["verified"]["weights"]["exact"]
        assert re.search(r"\bfloat32\b.*\b64\b", (out / "README.md").read_text())

    def test_it_does_not(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """One tensor that is not zero is enough for a difference."""
        from safetensors.torch import save_file

        out = grown(mk, tiny, tmp_path / "out", "interleave: every 2")
        tensors = load_tensors(out)
        tensors["model.layers.2.mlp.down_proj.weight"] += 0.01
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        found = forward.compare(tiny, out)
        assert not found.is_exact
        assert found.relative > MOST_DIFFERENT

    def test_a_window_is_exceeded(self, mk: Cli, tmp_path: Path) -> None:
        """The random tokens are more than the largest sliding window."""
        base = make_llama(
            tmp_path / "base", mistral=True, sliding_window=96, max_position_embeddings=512
        )
        out = grown(mk, base, tmp_path / "out", "interleave: every 4")
        found = measured(mk, base, out)
        assert (found["exact"], found["window"], found["random_tokens"]) == (True, 96, 160)
        assert re.search(r"\b160\b.*\bwindow\b\D*\b96\b", (out / "README.md").read_text())

    def test_without_a_tokenizer(self, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
        """Without a tokenizer there is no text, and no perplexity."""
        for file in own_tiny.glob("token*"):
            file.unlink()
        out = grown(mk, own_tiny, tmp_path / "out", "append: 1")
        found = measured(mk, own_tiny, out)
        assert (found["exact"], found["text_tokens"]) == (True, 0)
        assert "perplexity" not in found

    @pytest.mark.parametrize(
        "settings",
        [
            {"repetition_penalty": 1.7},
            {"num_beams": 3, "num_return_sequences": 3},
            {"do_sample": True, "temperature": 9.0, "top_k": 3},
            {"stop_strings": ["word1"]},
            {"eos_token_id": list(range(64))},
            {"penalty_alpha": 0.6, "top_k": 4},
            {"max_length": 3},
        ],
    )
    def test_generation_settings_are_ignored(
        self, settings: dict[str, Any], mk: Cli, own_tiny: Path, tmp_path: Path
    ) -> None:
        """The settings in generation_config.json do not change the comparison."""
        file = own_tiny / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        out = grown(mk, own_tiny, tmp_path / "out", "append: 1")
        found = measured(mk, own_tiny, out)
        assert (found["exact"], found["greedy_tokens"]) == (True, 16)


class TestNoIdentity:
    """A model that computes something else is measured but not judged."""

    def test_copies(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """The report states the difference and both perplexities."""
        out = grown(mk, tiny, tmp_path / "out", "repeat: [2, 6]")
        found = measured(mk, tiny, out)
        assert "exact" not in found
        assert found["largest_difference"] > 0
        assert found["perplexity"] != found["base_perplexity"]
        card = (out / "README.md").read_text()
        assert re.search(rf"\bperplexity\b.*{found['perplexity']:.4g}", card)

    def test_converted(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A converted model is not reported as exact, because rounding changes the logits."""
        out = tmp_path / "out"
        assert mk("run", "append: 1, dtype: bfloat16", out, "--model", tiny).status == 0
        found = measured(mk, tiny, out)
        assert "exact" not in found
        assert 0 < found["largest_difference"] < found["largest_logit"]


class TestTooLarge:
    """Weights that do not fit into memory stay on disk."""

    def test_offloaded_weights(self, mk: Cli, tmp_path: Path) -> None:
        """The result is the same if transformers and accelerate offload weights to disk."""
        import torch

        base = make_llama(tmp_path / "base", hidden_size=256, dtype=torch.bfloat16)
        out = grown(mk, base, tmp_path / "out", "interleave: every 4")
        assert "offloaded" not in measured(mk, base, out)
        found = measured(mk, base, out, "--max-memory", "4MB")
        assert (found["exact"], found["offloaded"]) == (True, True)


class TestRefused:
    """Models that cannot be compared."""

    def test_a_model_whose_files_differ(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A model whose files differ already is not loaded."""
        out = grown(mk, tiny, tmp_path / "out", "append: 1")
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
        result = mk("verify", out, "--against", tiny, "--forward")
        assert (result.status, "forward" in result.out) == (1, False)

    def test_what_transformers_cannot_load(self, tiny: Path, tmp_path: Path) -> None:
        """The error gives the reason why transformers cannot load the model."""
        (tmp_path / "config.json").write_text('{"model_type": "none_such"}')
        with pytest.raises(RefusedError, match="none_such"):
            forward.compare(tiny, tmp_path)

    def test_a_model_that_lacks_a_tensor(self, own_tiny: Path, tiny: Path) -> None:
        """A missing tensor is an error, because transformers would initialize it at random."""
        from safetensors.torch import save_file

        tensors = load_tensors(own_tiny)
        del tensors["model.layers.3.mlp.up_proj.weight"]
        save_file(tensors, own_tiny / "model.safetensors", {"format": "pt"})
        with pytest.raises(RefusedError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
            forward.compare(tiny, own_tiny)

    def test_logits_that_are_nan(self, own_tiny: Path, tiny: Path) -> None:
        """Logits that are NaN are an error, because they have no difference."""
        from safetensors.torch import save_file

        tensors = load_tensors(own_tiny)
        tensors["model.norm.weight"][0] = math.nan
        save_file(tensors, own_tiny / "model.safetensors", {"format": "pt"})
        with pytest.raises(RefusedError, match=r"\blogits\b"):
            forward.compare(tiny, own_tiny)

    def test_code_from_elsewhere(self, own_tiny: Path) -> None:
        """A config key that makes transformers download code is refused."""
        file = own_tiny / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
        with pytest.raises(RefusedError, match="somebody/kernel"):
            forward.compare(own_tiny, own_tiny)

    def test_another_tokenizer(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A model with another tokenizer is refused, because its logits differ in shape."""
        out = tmp_path / "out"
        words = "append: 1, tokenizer: {source: base, pad_to_multiple_of: 128}"
        result = mk("run", words, out, "--model", tiny)
        assert result.status == 0, result.err
        result = mk("verify", out, "--against", tiny, "--forward")
        assert result.status == 1
        assert re.search(rf"^error: {re.escape(str(out))}: .*\btokenizer\b", result.err), result.err
