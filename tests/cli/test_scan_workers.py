"""Every way to measure a scan gives the same bytes, whatever is killed meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Cli

from mergekit_interleave import scan, scanned
from mergekit_interleave.errors import DirectiveError, RefusedError, RequirementError
from mergekit_interleave.scanning import ray_actors, results

FILES = ("scan.json", "scan.jsonl", "scores.npy", "scan.svg")

PRELOADED = [
    "mergekit_interleave.commands.scan",
    "mergekit_interleave.virtual.model",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
"""The modules that a process need not import, so that it begins to measure soon."""

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread, also in the processes that share the threads of this one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the options of a scan with two groups of layouts and two batches of sequences."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"word{i * i * 7 % 60 + i % 2}" for i in range(1400)))
    return {"model": tiny, "text": text, "space": ["blocks", "drops"], "tokens": 1100}


@pytest.fixture(scope="module")
def plain(words: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of an undisturbed scan in one process."""
    out = tmp_path_factory.mktemp("plain") / "out"
    scan(**words, out=out)
    return out


def assert_same(one: Path, other: Path) -> None:
    """Assert that two scans have the same bytes."""
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_gone(session: int) -> None:
    """Assert that all processes of a session end."""
    for _ in range(200):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process is left")


def command(words: dict[str, Any], out: Path, *more: str) -> list[str]:
    """Return the command line of a scan."""
    spaces = [word for space in words["space"] for word in ("--space", space)]
    options = ["--model", words["model"], "--text", words["text"], "--tokens", words["tokens"]]
    return ["scan", *spaces, *map(str, options), "--out", str(out), *more]


def is_begun(out: Path) -> bool:
    """Whether some scores are kept, and not all."""
    if not (out / results.SCORES).is_file():
        return False
    missing = np.isnan(np.load(out / results.SCORES))
    return not missing.all()


@pytest.mark.slow
def test_a_worker_is_killed(words: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    """Two processes give the bytes of one; the shards of a process that is killed are measured."""
    killed: list[int] = []
    ticks: list[int] = []

    def note(number: int) -> None:
        ticks.append(number)
        if not killed:
            victim = multiprocessing.active_children()[0]
            victim.kill()
            killed.append(victim.pid or 0)

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], object]]:
        assert total == 71
        yield note

    scan(**words, out=tmp_path / "out", workers=2, progress=bar)
    assert killed
    assert sum(ticks) == 71
    assert_same(tmp_path / "out", plain)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_measure_all_rounds(words: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    """The processes of the first round measure the combinations, too; one gives the same bytes."""
    seen: list[set[int | None]] = []

    @contextmanager
    def bar(_: int) -> Iterator[Callable[[int], object]]:
        yield lambda _: seen.append({each.pid for each in multiprocessing.active_children()})

    scan(**words, out=tmp_path / "two", workers=2, combine=2, progress=bar)
    assert set().union(*seen) == seen[-1]
    assert len(seen[-1]) == 2
    shutil.copytree(plain, tmp_path / "one")
    scan(**words, out=tmp_path / "one", combine=2)
    assert_same(tmp_path / "two", tmp_path / "one")


def test_an_error_in_a_worker(words: dict[str, Any], mk: Cli, tmp_path: Path) -> None:
    """What a process refuses is the error of the command."""
    wrong = (*command(words, tmp_path / "out"), "--max-memory", "1KB", "--dtype", "bfloat16")
    alone, made = mk(*wrong), mk(*wrong, "--workers", 2)
    assert made.status == alone.status == 1
    assert made.err == alone.err


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_command_is_ended(
    how: signal.Signals, words: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    """However a command with several processes is ended, none is left, and it can be resumed."""
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, "-m", "mergekit_interleave", *command(words, out, "--workers", "2")],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not is_begun(out) and running.poll() is None:
        time.sleep(0.01)
    if how == signal.SIGINT:
        os.killpg(running.pid, how)  # as a terminal does
    else:
        running.send_signal(how)
    printed, errors = running.communicate(timeout=60)
    assert running.returncode == (130 if how == signal.SIGINT else -how), errors
    assert "Traceback" not in errors
    assert not printed
    assert_gone(running.pid)
    scan(**words, out=out)
    assert_same(out, plain)


@POSIX
@pytest.mark.parametrize("most", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    most: int, words: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    """Scans that are killed at random moments and resumed end with the same bytes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def ended(out: Path, seconds: float | None) -> bool:
        process = context.Process(target=scan, kwargs={**words, "out": out})
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in {0, -signal.SIGKILL}
        return process.exitcode == 0

    first = context.Process(target=int)  # starts the server, which imports the modules
    first.start()
    first.join()
    begin = time.monotonic()
    assert ended(tmp_path / "whole", None)
    whole = time.monotonic() - begin
    assert_same(tmp_path / "whole", plain)
    numbers, kills, trial = random.Random(0), 0, 0  # noqa: S311 - no secrets
    while kills < most:
        out = tmp_path / f"out{trial}"
        while kills < most and not ended(out, numbers.uniform(0, whole)):
            kills += 1
        ended(out, None)
        assert_same(out, plain)
        trial += 1


def test_killed_while_it_creates_its_files(
    words: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    """A scan that was killed before its scores were there is resumed, and leaves no other file."""
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{results.RECORD}.abc").write_text("{")
    scan(**words, out=out)
    (out / results.SCORES).rename(out / f".{results.SCORES}")
    scan(**words, out=out)
    assert_same(out, plain)
    assert {file.name for file in out.iterdir()} == {file.name for file in plain.iterdir()}


def test_killed_before_the_last_lines(words: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    """Scores that are kept have their lines after the next call, even if nothing is measured."""
    out = tmp_path / "out"
    scan(**words, out=out)
    lines = (out / results.LINES).read_bytes()
    (out / results.LINES).write_bytes(lines[: len(lines) // 2])
    scan(**words, out=out)
    assert_same(out, plain)
    assert scanned(out).lines() == scanned(plain).lines()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 0}, "--workers"),
        ({"workers": "many"}, "--workers"),
        ({"num_cpus": 2}, "--num-cpus"),
        ({"num_gpus": -1}, "--num-gpus"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], named: str, words: dict[str, Any]) -> None:
    """A wrong number of workers, or one for Ray without Ray, is named."""
    with pytest.raises(DirectiveError, match=named):
        scan(**words, **options)


def test_without_ray(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If Ray is missing, the error says how to install what pyproject.toml has as an extra."""
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(RequirementError, match="ray") as caught:
        scan(**words, ray="local")
    assert str(caught.value.hint) == f"pip install {ray_actors.WANTED!r}"
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'ray = ["{ray_actors.WANTED}"]' in project


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Return a Ray cluster whose first node has no CPUs, so that actors are on other nodes."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_node_of_ray_is_lost(
    cluster: Any, words: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    """Two nodes give the bytes of one process, even if one of them is lost meanwhile."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ticks: list[int] = []

    def note(number: int) -> None:
        ticks.append(number)
        if nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    @contextmanager
    def bar(_: int) -> Iterator[Callable[[int], object]]:
        yield note

    scan(**words, out=tmp_path / "out", ray=cluster.address, progress=bar)
    assert not nodes
    assert sum(ticks) == 71
    assert_same(tmp_path / "out", plain)


def test_too_little_for_ray(
    cluster: Any, words: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    """A cluster with no machine for an actor is an error, and actors may reserve nothing.

    That no cluster is there is another error.
    """
    with pytest.raises(RefusedError, match="1 CPU") as caught:
        scan(**words, ray=cluster.address)
    assert "smaller --num-cpus" in str(caught.value.hint)
    scan(**words, out=tmp_path / "out", ray=cluster.address, num_cpus=0)
    assert_same(tmp_path / "out", plain)


def test_no_cluster(words: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    """An address at which there is no cluster is an error at once; the hint starts one."""
    pytest.importorskip("ray")
    with pytest.raises(DirectiveError, match="127") as caught:
        scan(**words, ray="127.0.0.1:1")
    assert "--ray local" in str(caught.value.hint)
    scan(**words, out=tmp_path / "out", ray="local")
    assert_same(tmp_path / "out", plain)
