"""Deeper models in memory, compared with the ones that `run` writes."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from harness import Cli, make_llama, set_keys
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mergekit_interleave as api
from mergekit_interleave.errors import DirectiveError, InterleaveError, RefusedError
from mergekit_interleave.layout.fingerprint import fingerprint

PLANS = (
    "interleave: every 2",
    "stack: [[0, 3], [2, 4], [2, 4], [2, 8]]",
    "stack: [[4, 8], [0, 4], [2, 5]]",
    "drop: [2, 4]",
)
"""Identities, an uneven threefold repeat, a block out of place, and layers left out."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 8 layers in float32 with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("load") / "base")


@pytest.fixture
def base(llama: Path) -> LlamaForCausalLM:
    """Return the loaded Llama."""
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


def tokens() -> torch.Tensor:
    """Return a batch of one."""
    return torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a Llama."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits
    return found


def places(model: Any) -> set[int]:
    """Return the addresses of the memory of a model's parameters."""
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


class TestEqualToTheWrittenModel:
    """A model in memory computes what the written one computes."""

    @pytest.mark.parametrize(
        ("name", "plan"),
        [
            ("llama", "interleave: every 2, zero: none, scale: {q_proj: 0.3, mlp: 0.7}"),
            ("llama", "interleave: every 2, zero: none, dtype: float16"),
            ("llama", "repeat: {layers: [2, 5]}, zero: none, apply_to: all, scale: {o_proj: 0.5}"),
            ("mixtral", "interleave: every 2, zero: [o_proj, w3]"),
        ],
    )
    def test_computed_tensors(self, name: str, plan: str, tmp_path: Path) -> None:
        """Scaled, partly scaled and converted tensors are equal to the written ones."""
        source = zoo.save(name, tmp_path / "base")
        words = ("--allow-non-identity",) if "w3]" in plan else ()
        status, err = zoo.mk("run", plan, str(tmp_path / "out"), "--model", str(source), *words)
        assert not status, err
        grown = api.load(plan, model=source, dtype="float32", allow_non_identity=bool(words))
        written = zoo.load(tmp_path / "out")
        for one, other in zip(zoo.outputs(grown), zoo.outputs(written), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(("names", "scaled"), [(("w1", "w3"), (0, 1)), (("w3",), (1,))])
    def test_experts_scaled_in_part(
        self, names: tuple[str, ...], scaled: tuple[int, ...], tmp_path: Path
    ) -> None:
        """A factor for some of the tensors that are merged in memory applies to their part."""
        source = zoo.save("mixtral", tmp_path / "base")
        factors = ", ".join(f"{name}: 0.5" for name in names)
        base = AutoModelForCausalLM.from_pretrained(source)
        grown = api.load(f"append: 1, zero: none, scale: {{{factors}}}", base=base)
        new, old = (model.model.layers[-1].mlp.experts.gate_up_proj for model in (grown, base))
        for part, (one, other) in enumerate(zip(new.chunk(2, 1), old.chunk(2, 1), strict=True)):
            assert torch.equal(one, other * 0.5 if part in scaled else other)

    def test_two_models(self, llama: Path, tmp_path: Path) -> None:
        """Layers of two models, one of them loaded already, are those of the written stack."""
        other = make_llama(tmp_path / "other")
        plan = {"models": {"a": str(llama), "b": str(other)}, "layout": ["a 0:5", "b 3:8"]}
        api.run(plan, tmp_path / "out")
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        base = AutoModelForCausalLM.from_pretrained(llama)
        for grown in (api.load(plan), api.load(plan, base=base)):
            assert torch.equal(logits(grown), logits(written))

    def test_settings(self, llama: Path, tmp_path: Path) -> None:
        """Config, generation config and the name of the tokenizer are those of the written one."""
        source = shutil.copytree(llama, tmp_path / "base")
        set_keys(source / "generation_config.json", top_k=7)
        base = AutoModelForCausalLM.from_pretrained(source)
        api.run(PLANS[0], tmp_path / "out", model=source)
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        grown = api.load(PLANS[0], base=base)
        skipped = ("_name_or_path", "transformers_version")
        one, other = (
            {key: value for key, value in model.config.to_dict().items() if key not in skipped}
            for model in (grown, written)
        )
        assert one == other
        assert grown.generation_config.to_dict() == written.generation_config.to_dict()
        assert grown.name_or_path == str(source)
        assert not grown.training


class TestMemory:
    """Tensors are shared."""

    def test_nothing_is_copied(self, base: LlamaForCausalLM) -> None:
        """Copies take no memory, zeros that of one number, and scaled tensors their own."""
        assert places(api.load(PLANS[1], base=base)) == places(base)
        zeros = places(api.load(PLANS[0], base=base)) - places(base)
        assert len(zeros) == 1
        grown = api.load("interleave: every 2, zero: none, scale: {o_proj: 0.5}", base=base)
        own = [
            name
            for name, parameter in grown.named_parameters()
            if parameter.untyped_storage().data_ptr() not in places(base)
        ]
        assert own == [f"model.layers.{index}.self_attn.o_proj.weight" for index in (2, 5, 8, 11)]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_a_converted_base(self, dtype: torch.dtype, base: LlamaForCausalLM) -> None:
        """A base that was converted after loading is shared in its new dtype."""
        base.to(dtype)
        grown = api.load(PLANS[1], base=base)
        assert places(grown) == places(base)
        assert {parameter.dtype for parameter in grown.parameters()} == {dtype}

    def test_merged_experts(self, tmp_path: Path) -> None:
        """Experts that transformers merges on loading are shared, too."""
        source = zoo.save("mixtral", tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(source)
        assert places(api.load(PLANS[1], base=base)) == places(base)

    def test_the_base_is_unharmed(self, base: LlamaForCausalLM, tmp_path: Path) -> None:
        """After ten loads, a training step and a save, the base computes the same, to the bit."""
        before, text = logits(base), base.generate(tokens(), max_new_tokens=5, do_sample=False)
        state = {name: copy.deepcopy(value) for name, value in base.state_dict().items()}
        for _ in range(5):
            api.load(PLANS[0], base=base)
            api.load(PLANS[1], base=base)
        grown = api.load(PLANS[0], base=base, trainable=True)
        trained = [parameter for parameter in grown.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        grown(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        grown.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(base), before)
        assert torch.equal(base.generate(tokens(), max_new_tokens=5, do_sample=False), text)
        assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
        assert all(parameter.requires_grad for parameter in base.parameters())


class TestSaving:
    """`save_pretrained` stores every layer."""

    def test_reloaded(self, llama: Path, base: LlamaForCausalLM, mk: Cli, tmp_path: Path) -> None:
        """The saved model is the one that `run` writes, and records the same layout."""
        for number, plan in enumerate(PLANS):
            grown, out = api.load(plan, base=base), tmp_path / str(number)
            grown.save_pretrained(out)
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(grown))
            result = mk("verify", out, "--against", llama)
            assert result.status == 0, result.err + result.out
            content = json.loads((out / "interleave.json").read_text())
            assert content["fingerprint"] == fingerprint(api.plan(plan, model=llama).layout)
            assert content["engine"] == "transformers"

    @pytest.mark.parametrize("name", ["mixtral", "gemma4_text", "qwen3_next", "gpt_oss", "gpt2"])
    def test_types(self, name: str, tmp_path: Path) -> None:
        """Models whose class renames, merges or ties tensors are saved whole, too."""
        source = zoo.save(name, tmp_path / "base")
        for number, plan in enumerate((PLANS[0], PLANS[1])):
            try:
                grown = api.load(plan, model=source)
            except RefusedError:
                assert number
                continue
            grown.save_pretrained(tmp_path / str(number))
            saved = zoo.load(tmp_path / str(number))
            for one, other in zip(zoo.outputs(grown), zoo.outputs(saved), strict=True):
                assert torch.equal(one, other)

    def test_shards(self, base: LlamaForCausalLM, tmp_path: Path) -> None:
        """A save in small shards holds every layer, too."""
        grown = api.load(PLANS[1], base=base)
        grown.save_pretrained(tmp_path / "out", max_shard_size="50KB")
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(grown)
        )

    def test_tied_heads(self, tmp_path: Path) -> None:
        """A head that the class ties stays tied, and is stored once."""
        source = make_llama(tmp_path / "base", tie_word_embeddings=True)
        grown = api.load(PLANS[1], model=source)
        grown.save_pretrained(tmp_path / "out")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
        assert torch.equal(logits(reloaded), logits(grown))

    def test_other_files(
        self, llama: Path, base: LlamaForCausalLM, mk: Cli, tmp_path: Path
    ) -> None:
        """Files that were in the directory before are not replaced by a later `run --force`."""
        (tmp_path / "thesis.txt").write_text("mine")
        grown = api.load(PLANS[0], base=base)
        for _ in range(2):
            grown.save_pretrained(tmp_path)
            content = json.loads((tmp_path / "interleave.json").read_text())
            assert set(content["files"]) == {path.name for path in tmp_path.iterdir()} - {
                "thesis.txt"
            }
        result = mk("run", PLANS[0], tmp_path, "--model", llama, "--force")
        assert (result.status, "thesis.txt" in result.err) == (1, True)

    def test_a_dtype(self, llama: Path, mk: Cli, tmp_path: Path) -> None:
        """A model that was loaded in another dtype is recorded in it."""
        for plan, dtype in ((PLANS[0], "bfloat16"), (f"{PLANS[1]}\ndtype: float16", "auto")):
            out = tmp_path / dtype
            api.load(plan, model=llama, dtype=dtype).save_pretrained(out)
            for words in ((), ("--against", llama)):
                result = mk("verify", out, *words)
                assert result.status == 0, result.err + result.out

    def test_pickle(self, base: LlamaForCausalLM, llama: Path, mk: Cli, tmp_path: Path) -> None:
        """A pickled model shares its tensors, and saves every layer."""
        grown = api.load(PLANS[1], base=base)
        restored = pickle.loads(pickle.dumps(grown))  # noqa: S301 - our own bytes
        assert torch.equal(logits(restored), logits(grown))
        restored.save_pretrained(tmp_path / "out")
        assert mk("verify", tmp_path / "out", "--against", llama).status == 0


def _with_bias(model: Any) -> None:
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(old.in_features, old.out_features)


class TestTraining:
    """`trainable=True`."""

    def test_only_new_layers(self, base: LlamaForCausalLM) -> None:
        """The new layers have their own memory and gradients; nothing else has."""
        grown = api.load(PLANS[0], base=base, trainable=True)
        for name, parameter in grown.named_parameters():
            is_new = any(f"layers.{index}." in name for index in (2, 5, 8, 11))
            assert parameter.requires_grad is is_new, name
            assert (parameter.untyped_storage().data_ptr() in places(base)) is not is_new

    def test_other_layers(
        self, llama: Path, base: LlamaForCausalLM, mk: Cli, tmp_path: Path
    ) -> None:
        """`freeze_original_layers` gives what it selects memory of its own, and the head, too."""
        before = logits(base)
        with pytest.raises(RefusedError, match="no new layers") as raised:
            api.load("drop: [2, 4]", base=base, trainable=True)
        assert 'layers="seams"' in str(raised.value.hint)
        grown = api.load("drop: [2, 4]", base=base)
        trained = api.freeze_original_layers(grown, layers="seams", also=["lm_head"])
        own = [name for name, each in grown.named_parameters() if each.requires_grad]
        assert own == trained != []
        assert not {grown.get_parameter(name).data_ptr() for name in own} & places(base)
        optimizer = torch.optim.SGD([each for each in grown.parameters() if each.requires_grad], 1)
        grown(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        assert torch.equal(logits(base), before)
        grown.save_pretrained(tmp_path / "out")
        named = ("--trained", "--layers", "seams", "--also", "lm_head")
        result = mk("verify", tmp_path / "out", "--against", llama, *named)
        assert result.status == 0, result.err + result.out

    def test_a_merged_lora(self, base: LlamaForCausalLM) -> None:
        """A safe merge of a LoRA changes neither the base nor another occurrence of the layer."""
        peft = pytest.importorskip("peft")
        before, grown = logits(base), api.load(PLANS[1], base=base)
        settings = peft.LoraConfig(
            target_modules=["down_proj"], layers_to_transform=[3], init_lora_weights=False
        )
        adapted = peft.get_peft_model(grown, settings)
        expected = logits(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
        assert torch.equal(logits(base), before)

    def test_a_trainer(self, llama: Path, mk: Cli, tmp_path: Path) -> None:
        """What transformers' Trainer trains and saves passes `verify --trained`."""
        grown = api.load(PLANS[0], model=llama, trainable=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.1, report_to=[],
            use_cpu=True, per_device_train_batch_size=1, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": tokens()[0], "labels": tokens()[0]}] * 2
        trainer = transformers.Trainer(grown, arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        result = mk("verify", tmp_path / "out", "--against", llama, "--trained")
        assert result.status == 0, result.err + result.out
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(reloaded), logits(grown))
        assert not torch.equal(logits(grown), logits(LlamaForCausalLM.from_pretrained(llama)))

    def test_nothing_is_trained_by_default(self, base: LlamaForCausalLM) -> None:
        """Without the option, training could change the base, so no parameter is trained."""
        assert not any(p.requires_grad for p in api.load(PLANS[0], base=base).parameters())


class TestRefused:
    """Each wrong input is one clear error."""

    def test_another_base(self, base: LlamaForCausalLM, tmp_path: Path) -> None:
        """A directive that names another model than `base`."""
        other = make_llama(tmp_path / "other")
        with pytest.raises(DirectiveError, match=str(other)):
            api.load(PLANS[0], model=other, base=base)

    def test_another_depth(self, base: LlamaForCausalLM) -> None:
        """A loaded model without some of its layers, and one that was grown in memory."""
        grown = api.load(PLANS[1], base=base)
        base.model.layers = base.model.layers[:4]
        for wrong in (base, grown):
            with pytest.raises(DirectiveError, match="layers"):
                api.load(PLANS[0], base=wrong)

    @pytest.mark.parametrize("wrong", ["a model", 7, LlamaForCausalLM, torch.nn.Linear(1, 1)])
    def test_no_model(self, wrong: object) -> None:
        """Something that is no loaded model."""
        with pytest.raises(DirectiveError, match="base"):
            api.load(PLANS[0], base=wrong)

    def test_unknown_origin(self, base: LlamaForCausalLM) -> None:
        """A model that does not record its checkpoint; it helps to name that."""
        place, base.name_or_path = base.name_or_path, ""
        with pytest.raises(DirectiveError, match="base"):
            api.load(PLANS[0], base=base)
        grown = api.load(PLANS[1], model=place, base=base)
        assert places(grown) == places(base)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "rms_norm_eps"),
            (lambda model: model.config.rope_parameters.update(rope_theta=7.0), "rope_parameters"),
            (_with_bias, "up_proj.bias"),
        ],
    )
    def test_a_changed_base(self, change: Any, named: str, base: LlamaForCausalLM) -> None:
        """A base that computes something else than its checkpoint says."""
        change(base)
        with pytest.raises(DirectiveError, match=named):
            api.load(PLANS[0], base=base)

    def test_another_class(self, base: LlamaForCausalLM) -> None:
        """A base that was loaded without its head; the hint names the class that has one."""
        with pytest.raises(DirectiveError, match="LlamaModel") as raised:
            api.load(PLANS[0], base=transformers.AutoModel.from_pretrained(base.name_or_path))
        assert "LlamaForCausalLM" in str(raised.value.hint)

    def test_a_base_that_moved(self, base: LlamaForCausalLM, llama: Path) -> None:
        """A base whose directory is not where it was; it helps to name that."""
        base.name_or_path = "moved"
        with pytest.raises(DirectiveError, match="moved") as raised:
            api.load(PLANS[0], base=base)
        assert "`model`" in str(raised.value.hint)
        assert api.load(PLANS[0], base=base, model=llama)

    def test_two_dtypes(self, llama: Path) -> None:
        """A dtype in the directive whose numbers the loaded model cannot represent."""
        half = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
        for where in ({"base": half}, {"model": llama, "dtype": torch.bfloat16}):
            with pytest.raises(DirectiveError, match="float16"):
                api.load(f"{PLANS[0]}\ndtype: float16", **where)

    def test_devices(self, base: LlamaForCausalLM) -> None:
        """A model with a part on another device."""
        base.model.layers[3].to("meta")
        with pytest.raises(RefusedError, match="device"):
            api.load(PLANS[0], base=base)

    def test_options_of_a_loaded_base(self, base: LlamaForCausalLM) -> None:
        """A dtype for a model that is loaded already."""
        with pytest.raises(DirectiveError, match="dtype"):
            api.load(PLANS[0], base=base, dtype="float16")

    def test_what_run_refuses(self, base: LlamaForCausalLM) -> None:
        """A layout that does not fit the model."""
        with pytest.raises(InterleaveError) as of_load:
            api.load("drop: 9:12", base=base)
        with pytest.raises(InterleaveError) as of_run:
            api.run("drop: 9:12", "unused", model=base.name_or_path)
        assert str(of_load.value) == str(of_run.value)

    def test_no_memory(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine without the memory for the base; a smaller dtype helps, as the hint says."""
        load = LlamaForCausalLM.from_pretrained

        def small(*place: object, **how: Any) -> Any:
            if str(how["dtype"]).removeprefix("torch.") not in ("bfloat16", "meta"):
                raise MemoryError
            return load(*place, **how)

        monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", small)
        with pytest.raises(RefusedError, match="memory") as raised:
            api.load(PLANS[0], model=llama)
        assert "dtype='bfloat16'" in str(raised.value.hint)
        assert api.load(PLANS[0], model=llama, dtype="bfloat16").dtype == torch.bfloat16
