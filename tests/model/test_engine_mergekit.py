"""The mergekit engine: each workaround has a test that fails once mergekit is fixed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from harness import Cli, assert_same_tensors, make_llama
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions

from mergekit_interleave.engines import mergekit


def test_mergekit_remembers_models_for_the_life_of_the_process(tmp_path: Path) -> None:
    """`_fresh_loaders`: mergekit reads a new model at the same path with the old index."""
    path = make_llama(tmp_path / "model", layers=2)
    reference = ModelReference.model_validate(str(path))
    LoaderCache().setup(MergeOptions())
    before = set(LoaderCache().get(reference).index.tensor_paths)
    make_llama(path, layers=3)
    assert set(LoaderCache().get(reference).index.tensor_paths) == before


def test_a_model_that_was_replaced_is_read_again(mk: Cli, tmp_path: Path) -> None:
    """A second run in one process reads the model that has replaced the first."""
    base = make_llama(tmp_path / "model", layers=2)
    assert mk("run", "append: 1", tmp_path / "a", "--model", base).status == 0
    make_llama(base, layers=3)
    result = mk("run", "append: 1", tmp_path / "b", "--model", base)
    assert result.status == 0, result.err


def test_mergekit_asks_the_hub_for_what_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_local`: mergekit lists the repository's files before it looks at the cache."""

    def asked(*_: object, **__: object) -> None:
        raise ConnectionError("asked")

    monkeypatch.setattr("huggingface_hub.list_repo_files", asked)
    with pytest.raises(ConnectionError, match="asked"):
        ModelReference.model_validate("org/name").local_path()


def test_mergekit_warns_of_tensors_written_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`clone_tensors`: without it, mergekit warns of duplicated tensors."""
    tensor = torch.zeros(4)
    with caplog.at_level(logging.WARNING, "mergekit"), TensorWriter(str(tmp_path)) as writer:
        writer.save_tensor("a", tensor)
        writer.save_tensor("b", tensor)
    assert "duplicated tensors" in caplog.text


def test_copies_do_not_make_it_warn(
    mk: Cli, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `clone_tensors`, mergekit does not warn of duplicates."""
    assert mk("run", "repeat: [2, 4]", tmp_path / "out", "--model", tiny).status == 0
    assert "duplicated" not in caplog.text


def test_a_directory_with_mergekits_marks_in_its_name(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A directory name may contain `+`, `@`, spaces and letters of all alphabets."""
    odd = tmp_path / "a+b@c d é"
    odd.symlink_to(tiny)
    result = mk("run", "append: 1", tmp_path / "odd out", "--model", odd)
    assert result.status == 0, result.err
    assert mk("run", "append: 1", tmp_path / "out", "--model", tiny).status == 0
    assert_same_tensors(tmp_path / "odd out", tmp_path / "out")


def test_every_option_that_is_decided_here_exists() -> None:
    """Every refused option exists in mergekit: a renamed one would not be refused."""
    assert set(mergekit.DECIDED_HERE) <= set(MergeOptions.model_fields)
    flags = {"cuda", "device", "low_cpu_memory", "lazy_unpickle", "async_write"}
    assert flags | {"trust_remote_code"} <= set(MergeOptions.model_fields)


@pytest.mark.parametrize(
    "flags",
    [
        ["--async-write", "--mergekit", "write_threads=2"],
        ["--low-cpu-memory", "--device", "cpu"],
        ["--mergekit", "num-threads=1", "--mergekit", "random_seed=7"],
    ],
)
def test_options_reach_mergekit(
    mk: Cli, tiny: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options can be set by their own flags and by --mergekit; the tensors stay the same."""
    monkeypatch.setattr(
        torch, "set_num_interop_threads", lambda _: None
    )  # allowed once per process
    result = mk("run", "append: 1", tmp_path / "out", "--model", tiny, *flags)
    assert result.status == 0, result.err
    assert mk("run", "append: 1", tmp_path / "plain", "--model", tiny).status == 0
    assert_same_tensors(tmp_path / "out", tmp_path / "plain")


def test_a_lora_is_merged_first(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """`base+adapter` works as in mergekit, and its scratch directory is not left in OUT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    with_lora = f"{tiny}+{tmp_path / 'adapter'}"
    result = mk("run", "append: 1", tmp_path / "out", "--model", with_lora)
    assert result.status == 0, result.err
    assert mk("run", "append: 1", tmp_path / "plain", "--model", tmp_path / "merged").status == 0
    assert_same_tensors(tmp_path / "out", tmp_path / "plain")
    assert not list((tmp_path / "out").glob(".*"))
    assert str(tmp_path) not in (tmp_path / "out" / "mergekit_config.yml").read_text()
