"""Check that OUT is whole or absent after a kill, a full disk or a failing system call.

`test_faults.py` runs a few of these checks. `make faults` runs all that the machine allows: it
mounts a small filesystem if it may, and makes system calls fail if strace is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_files import make_gguf
from harness import make_llama

from mergekit_interleave.engines import registry

ENGINES = tuple(registry.ENGINES)
GGUF = "gguf"
"""The form of a model that the stream engine writes, too."""

FORMS = (*ENGINES, GGUF)
"""The engines for model directories, and GGUF files."""
DIRECTIVE = "interleave: every 2"
SYSCALLS = {
    "write": "ENOSPC", "pwrite64": "ENOSPC", "copy_file_range": "EIO", "ftruncate": "ENOSPC",
    "fsync": "EIO", "rename": "EACCES", "mkdir": "ENOSPC", "chmod": "EPERM",
}  # fmt: skip
"""System calls that write, and the error that each one returns."""

IMPORTED = (
    "mergekit.merge", "mergekit.multigpu_executor", "mergekit_interleave.commands.run",
    "mergekit_interleave.verification.report", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""Modules that a run imports; the imports take longer than the run."""


def base(folder: Path) -> Path:
    """Create a model that takes a while to write: 15 MB in several shards."""
    return make_llama(
        folder / "base",
        hidden_size=256,
        intermediate_size=512,
        vocab_size=2048,
        layers=6,
        shard_size="3MB",
    )


def gguf_base(folder: Path) -> Path:
    """Create a GGUF file that takes a while to write: 15 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_gguf(folder / "base.gguf", kind="F32", hidden=256, layers=8)


def source_of(form: str, folder: Path) -> Path:
    """Create the base of a form."""
    return gguf_base(folder) if form == GGUF else base(folder)


def out_of(form: str, place: Path) -> Path:
    """Return OUT of a form."""
    return place / ("out.gguf" if form == GGUF else "out")


def words_of(form: str, source: Path, out: Path) -> tuple[object, ...]:
    """Return the arguments of a run; OUT is the last."""
    how = ["--out-shard-size", "5MB"] if form == GGUF else ["--engine", form]
    return ("run", "--model", source, *how, DIRECTIVE, out)


def opened_by(out: Path) -> Path:
    """Return the path by which OUT is opened: the first split, if there are several."""
    return next(iter(sorted(out.parent.glob(f"{out.stem}-00001-of-*{out.suffix}"))), out)


def parts_of(out: Path) -> list[Path]:
    """Return the files of OUT, or its directory."""
    if out.suffix != ".gguf":
        return [out] if os.path.lexists(out) else []
    return [*out.parent.glob(f"{out.stem}*.gguf"), *out.parent.glob(f"{out.stem}.md")]


def remove(out: Path) -> None:
    """Remove OUT."""
    for part in parts_of(out):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


@dataclass
class Runner:
    """Starts runs without waiting for imports.

    A process that has imported everything forks for each run.

    Attributes:
        process: The process that forks.
    """

    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        """Start the process."""
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def start(self, *words: object, **how: Any) -> int:
        """Start the command line, and return its process id.

        Args:
            words: The arguments of the command line.
            how: Options of the run; see `_child`.
        """
        assert self.process.stdin
        order = {"words": list(map(str, words)), **how}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> tuple[int, str]:
        """Wait for the run; return its exit code, negative for a signal, and its output."""
        status, output = json.loads(self._line())
        return os.waitstatus_to_exitcode(status), output

    def run(self, *words: object, **how: Any) -> tuple[int, str]:
        """Start a run and wait for it."""
        self.start(*words, **how)
        return self.end()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()


def _serve() -> None:
    """Fork a run for each line of standard input."""
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a fork does not copy threads
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            pid = os.fork()
            if pid == 0:
                _child(json.loads(line), output)
            print(pid, flush=True)
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            print(json.dumps([status, output.read()]), flush=True)


def _child(order: dict[str, Any], output: Any) -> None:
    """Run a command line in this process.

    The order may contain `powerless` (permissions apply to root as well), `environment`,
    `most_bytes` of one file, and `fault`, the name of a function of this module to call first.
    """
    from mergekit_interleave.__main__ import main

    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ.update(order.get("environment", {}))
    tempfile.tempdir = None
    if "most_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["most_bytes"],) * 2)
    if "fault" in order:
        globals()[order["fault"]](order)
    if order.get("powerless"):
        _give_up_capabilities()
    sys.argv = ["mk-interleave", *order["words"]]
    try:
        main()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)
    finally:
        os._exit(99)


def _give_up_capabilities() -> None:
    """Drop root's capabilities, so that permissions apply to it as to any user.

    The process stays root, because another user may be unable to read this Python's own files,
    which may be in root's home. Any process may drop capabilities; see capset(2).
    """
    version = 0x20080522
    header, none = struct.pack("=Ii", version, 0), bytes(2 * 3 * 4)
    assert ctypes.CDLL(None).capset(header, none) == 0


def no_room_later(_: dict[str, Any]) -> None:
    """Skip the check of free space, as if the disk filled up after it."""
    from mergekit_interleave.commands import gguf
    from mergekit_interleave.engines import mergekit, select

    select.check_free = mergekit.check_free = gguf.check_free = lambda *_: None


def parent_closed_later(order: dict[str, Any]) -> None:
    """Remove the permission to write beside OUT while the weights are written."""
    from mergekit_interleave.engines.writer import Writer

    write = Writer.write

    def closing(writer: Any) -> Any:
        outcome = write(writer)
        Path(order["words"][-1]).parent.chmod(0o555)
        return outcome

    Writer.write = closing


def source_cut_short(order: dict[str, Any]) -> None:
    """Cut a shard of the base in half before the weights are written."""
    from mergekit_interleave.engines.writer import Writer

    write = Writer.write

    def cutting(writer: Any) -> Any:
        shard = sorted(Path(order["source"]).glob("*.safetensors"))[1]
        os.truncate(shard, shard.stat().st_size // 2)
        return write(writer)

    Writer.write = cutting


def verified(out: Path, source: Path) -> bool:
    """Whether OUT passes `verify`."""
    from mergekit_interleave.cli import main as cli

    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            cli.main(["verify", str(opened_by(out)), "--against", str(source)])
    except SystemExit as error:
        return not error.code
    return False


def whole_or_absent(out: Path, source: Path) -> bool:
    """Whether OUT is a whole model or absent."""
    return verified(out, source) if os.path.lexists(opened_by(out)) else True


def kills(runner: Runner, form: str, source: Path, out: Path, count: int) -> Counter[str]:
    """Kill runs at moments spread over a run; half of the runs replace a model.

    After each kill, OUT must be absent or whole, and the next run must succeed and leave no file
    beside it.

    Args:
        runner: The process that starts the runs.
        form: The engine of the runs, or `GGUF`.
        source: The base.
        out: OUT, in a directory of its own.
        count: The number of runs.

    Returns:
        How often OUT was absent, whole, or anything else.
    """
    words = words_of(form, source, out)
    durations = []
    for _ in range(3):
        started = time.monotonic()
        status, output = runner.run(*words, "--force")
        if status:
            raise AssertionError(output)
        durations.append(time.monotonic() - started)
    results: Counter[str] = Counter()
    rng = random.Random(0)  # noqa: S311 - moments, not secrets
    for number in range(count):
        replaced = number % 2 == 1
        if not replaced:
            remove(out)
        pid = runner.start(*words, *(["--force"] if replaced else []))
        time.sleep((number + rng.random()) / count * sorted(durations)[1] * 1.2)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        runner.end()
        exists = os.path.lexists(opened_by(out))
        if not whole_or_absent(out, source):
            results["half a model"] += 1
        else:
            results["whole" if exists else "absent"] += 1
        status, output = runner.run(*words, "--force")
        if status or not verified(out, source):
            results[f"the next run failed: {output}"] += 1
        if litter(out):
            results[f"left beside OUT: {litter(out)}"] += 1
    return results


def litter(out: Path) -> list[str]:
    """List the files beside OUT."""
    own = parts_of(out)
    return sorted(entry.name for entry in out.parent.iterdir() if entry not in own)


def failing_calls(form: str, source: Path, out: Path, count: int) -> Counter[str]:
    """Make single system calls of runs fail.

    Args:
        form: The engine of the runs, or `GGUF`.
        source: The base.
        out: OUT, in a directory of its own.
        count: The number of runs for each call.

    Returns:
        How often runs were refused, survived the failure, or were wrong.
    """
    results: Counter[str] = Counter()
    words = [sys.executable, "-m", "mergekit_interleave", *map(str, words_of(form, source, out))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for call, error in SYSCALLS.items():
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        log = out.parent.with_name("calls")
        counted = [*strace[:3], "-o", str(log), *strace[5:], *words]
        subprocess.run(counted, env=environment, check=True, capture_output=True)
        calls = len(log.read_text().splitlines())
        remove(out)
        for number in range(min(count, calls)):
            when = 1 + number * calls // min(count, calls)
            inject = ["-e", f"inject={call}:error={error}:when={when}"]
            done = subprocess.run(
                [*strace, *inject, *words],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            right = whole_or_absent(out, source) and "Traceback" not in done.stderr
            succeeded = done.returncode == 0 or "standard output" in done.stderr
            right = right and succeeded == os.path.lexists(opened_by(out)) and not litter(out)
            right = right and (succeeded or not parts_of(out))
            result = "refused" if done.returncode else "survived"
            results[result if right else "wrong"] += 1
            if not right:
                print(f"{form}: {call} {when}: {done.returncode} {litter(out)} {done.stderr}")
            remove(out)
            for name in litter(out):
                shutil.rmtree(out.with_name(name), ignore_errors=True)
    return results


@contextmanager
def small_filesystem(folder: Path, megabytes: int) -> Iterator[Path | None]:
    """Mount a small filesystem; yield None if mounting is not allowed."""
    folder.mkdir()
    size = f"size={megabytes}m"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main() -> int:
    """Run all checks; return 1 if any fails."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, closing(Runner()) as runner:
        folder = Path(scratch)
        for form in FORMS:
            place = folder / form
            place.mkdir()
            source, out = source_of(form, folder / f"source-{form}"), out_of(form, place)
            results = kills(runner, form, source, out, 200)
            print(f"{form}: 200 kills: {dict(results)}", flush=True)
            bad += sum(n for result, n in results.items() if result not in ("absent", "whole"))
            remove(out)
            with small_filesystem(folder / f"small-{form}", 15) as small:
                if small is None:
                    print(f"{form}: full filesystem: not checked, mounting is not allowed")
                    continue
                words = words_of(form, source, out_of(form, small))
                status, output = runner.run(*words, fault="no_room_later")
                right = status == 1 and not list(small.iterdir()) and "No space left" in output
                result = output.strip() if right else f"wrong: {output}"
                print(f"{form}: full filesystem: {result}")
                bad += not right
            if not shutil.which("strace"):
                print(f"{form}: failing calls: not checked, strace is not installed")
                continue
            count = 5 if form == registry.MERGEKIT else 20
            results = failing_calls(form, source, out, count)
            print(f"{form}: failing calls: {dict(results)}", flush=True)
            bad += results["wrong"]
    print("all checks passed" if not bad else f"{bad} checks failed")
    return int(bool(bad))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="fork a run for each line of input")
    if parser.parse_args().serve:
        _serve()
    else:
        sys.exit(main())
