"""Measure time, CPU and memory of the engines side by side; print the ratios of one run.

It writes its own models (random weights, no torch), runs the processes in turn, and takes medians.
Shared blocks are measured on an XFS image, which only root may mount.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import models

DIRECTIVE = "interleave: every 4"
BEGIN, END = "<!-- measured -->", "<!-- end -->"

# The command line; it can skip fsync, and change the number of files written at once.
SCRIPT = """
import os, sys
from mergekit_interleave.engines import stream
from mergekit_interleave.__main__ import main
synced, at_once = sys.argv.pop(1), int(sys.argv.pop(1))
if synced == "no": os.fsync = lambda _: None
if at_once: stream._AT_ONCE = at_once
main()
"""


@dataclass(frozen=True)
class Cost:
    """The cost of one process.

    Attributes:
        wall: Seconds from start to end.
        cpu: Seconds of CPU time, user and system.
        peak: Bytes of memory.
        disk: Bytes of disk space that its files take.
    """

    wall: float
    cpu: float
    peak: int
    disk: int


@dataclass(frozen=True)
class Contender:
    """A command to measure.

    Attributes:
        name: Its name in the table.
        command: Its words; {base} and {out} are replaced by directories.
        synced: Whether `sync -f` of its files is timed as well.
    """

    name: str
    command: tuple[str, ...]
    synced: bool = False


def own(*flags: str, synced: bool, at_once: int = 0, engine: str = "stream") -> tuple[str, ...]:
    """Return a command line of this project."""
    words = ["run", DIRECTIVE, "{out}", "--model", "{base}", "--engine", engine, *flags]
    return (sys.executable, "-c", SCRIPT, "yes" if synced else "no", str(at_once), *words)


def beside(name: str) -> str:
    """Return the path of a command in the current environment."""
    return str(Path(sys.executable).with_name(name))


CP = ("cp", "-r", "--reflink=never", "{base}", "{out}")
STREAM = Contender(
    "`run --engine stream --no-verify`, not waiting for the disk", own("--no-verify", synced=False)
)
MERGEKIT = Contender("`mergekit-yaml`", (beside("mergekit-yaml"), "{recipe}", "{out}"))
COPY = Contender("`cp -r --reflink=never` of the base", CP)
STREAM_SYNCED = Contender("`run --engine stream`", own(synced=True))
COPY_SYNCED = Contender("`cp -r --reflink=never` of the base, `sync -f`", CP, synced=True)
PLAIN = Contender("`run`, by mergekit", own(synced=True, engine="auto"))
ALL = (STREAM, MERGEKIT, COPY, STREAM_SYNCED, COPY_SYNCED, PLAIN)


def measure(contender: Contender, places: dict[str, str], *, shares: bool = False) -> Cost:
    """Run a contender once; its output directory exists neither before nor after.

    Args:
        contender: What to run.
        places: The directories.
        shares: Measure disk space by the free space, since files may share blocks.
    """
    out = Path(places["out"])
    shutil.rmtree(out, ignore_errors=True)
    free = _free(out.parent)
    command = [word.format_map(places) for word in contender.command]
    if contender.synced:
        command = ["sh", "-c", '"$@" && sync -f "$0"', str(out), *command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}:\n{output.read().decode()}")
    disk = free - _free(out.parent) if shares else _allocated(out)
    shutil.rmtree(out, ignore_errors=True)
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, disk)


def _free(folder: Path) -> int:
    """Return the free space once it is stable, since XFS frees space in the background."""
    before = -1
    while True:
        os.sync()
        status = os.statvfs(folder)
        if status.f_bfree == before:
            return before * status.f_frsize
        before = status.f_bfree
        time.sleep(0.3)


def _allocated(folder: Path) -> int:
    if not folder.exists():
        return 0
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))


def in_turn(
    contenders: Sequence[Contender], places: dict[str, str], runs: int, *, shares: bool = False
) -> dict[Contender, Cost]:
    """Run all contenders in turn, several times; return medians without the first round."""
    costs: dict[int, list[Cost]] = {i: [] for i in range(len(contenders))}
    for turn in range(runs + 1):
        for i, contender in enumerate(contenders):
            cost = measure(contender, places, shares=shares)
            if turn:
                costs[i].append(cost)
            print(f"  {contender.name}: {cost.wall:.2f} s", file=sys.stderr, flush=True)
    return {contender: _median(costs[i]) for i, contender in enumerate(contenders)}


def _median(costs: Sequence[Cost]) -> Cost:
    def middle(value: Callable[[Cost], float]) -> float:
        return statistics.median(map(value, costs))

    return Cost(
        middle(lambda cost: cost.wall),
        middle(lambda cost: cost.cpu),
        int(middle(lambda cost: cost.peak)),
        int(middle(lambda cost: cost.disk)),
    )


def table(costs: dict[Contender, Cost]) -> str:
    """Return a table of the costs."""
    lines = ["| | wall | CPU | peak memory | disk |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {contender.name} | {cost.wall:.2f} s | {cost.cpu:.2f} s | "
        f"{cost.peak / 2**20:,.0f} MiB | {cost.disk / 1e6:,.1f} MB |"
        for contender, cost in costs.items()
    ]
    return "\n".join(lines)


def size_of(path: Path) -> int:
    """Return the bytes of a model's weights."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def compare(size: models.Size, folder: Path, runs: int) -> str:
    """Compare the engines with each other and with a copy, at one size."""
    print(f"{size.name}:", file=sys.stderr)
    base = models.build(size, folder / size.name)
    places = _places(base, folder)
    costs = in_turn(ALL, places, runs)
    result = grown(places)
    per_byte = (costs[STREAM_SYNCED].wall / result) / (costs[COPY_SYNCED].wall / size_of(base))
    stream, mergekit, synced = costs[STREAM], costs[MERGEKIT], costs[STREAM_SYNCED]
    return "\n\n".join(
        (
            (
                f"### {size_of(base) / 1e9:.1f} GB in {size.shards} "
                f"shard{'s' if size.shards > 1 else ''}, {size.layers} layers; "
                f"{result / 1e9:.1f} GB after expansion; {runs} runs"
            ),
            table(costs),
            (
                f"Without waiting for the disk and without verification, like mergekit-yaml, "
                f"`run --engine stream` is **{mergekit.wall / stream.wall:.1f} times as fast**, "
                f"with 1/{mergekit.cpu / stream.cpu:.1f} of the CPU time and "
                f"1/{mergekit.peak / stream.peak:.0f} of the memory. `run --engine stream` with "
                "verification and sync, which are on by default, is "
                f"{mergekit.wall / synced.wall:.1f} times as fast. If both wait for the disk, "
                f"`run --engine stream` takes **{per_byte:.2f}** times as long per byte of output "
                "as a copy."
            ),
        )
    )


def _places(base: Path, folder: Path) -> dict[str, str]:
    recipe = folder / f"{base.name}.yml"
    words = [beside("mk-interleave"), "gen", DIRECTIVE, "--model", str(base)]
    recipe.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return {"base": str(base), "recipe": str(recipe), "out": str(folder / "out")}


def grown(places: dict[str, str]) -> int:
    """Return the bytes of the result's weights."""
    out = Path(places["out"])
    command = [word.format_map(places) for word in STREAM.command]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    size = size_of(out)
    shutil.rmtree(out)
    return size


def at_once(size: models.Size, folder: Path, runs: int) -> str:
    """Measure whether writing several files at once helps."""
    print("files at once:", file=sys.stderr)
    places = _places(models.build(size, folder / size.name), folder)
    contenders = [
        Contender(
            f"{count} at once{', synced' if synced else ''}",
            own("--no-verify", synced=synced, at_once=count),
        )
        for synced in (False, True)
        for count in (1, 2, 3)
    ]
    return f"### Files at once, the same model\n\n{table(in_turn(contenders, places, runs))}"


def proof(size: models.Size, folder: Path, runs: int) -> str:
    """Compare the time of `verify` with the time to read both models."""
    print("verify:", file=sys.stderr)
    places = _places(models.build(size, folder / size.name), folder)
    places["made"] = str(folder / "made")
    shutil.rmtree(places["made"], ignore_errors=True)
    command = [word.format_map({**places, "out": places["made"]}) for word in STREAM.command]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    verify = (beside("mk-interleave"), "verify", "{made}")
    contenders = [
        Contender(
            "`cat` of both to /dev/null",
            ("sh", "-c", "cat {base}/*.safetensors {made}/*.safetensors > /dev/null"),
        ),
        Contender("`verify --against` the base", (*verify, "--against", "{base}")),
        Contender("`verify`, without the base", verify),
    ]
    costs = in_turn(contenders, places, runs)
    shutil.rmtree(places["made"])
    cat, against_base, _ = (costs[contender] for contender in contenders)
    return "\n\n".join(
        (
            "### Verify, the same model",
            table(costs),
            (
                f"`verify` takes {against_base.wall / cat.wall:.2f} times as long as `cat`, "
                "start-up included."
            ),
        )
    )


@contextmanager
def xfs(folder: Path, size: int) -> Iterator[Path | None]:
    """Mount a new XFS image; yield None if it cannot be mounted."""
    image, mount = folder / "xfs.img", folder / "xfs"
    mount.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    mounted = False
    try:
        for command in (
            ["mkfs.xfs", "-q", "-f", "-m", "reflink=1", str(image)],
            ["mount", "-o", "loop", str(image), str(mount)],
        ):
            subprocess.run(command, check=True, capture_output=True)
        mounted = True
        yield mount
    except (OSError, subprocess.CalledProcessError) as error:
        if mounted:
            raise
        print(f"no XFS: {error}", file=sys.stderr)
        yield None
    finally:
        if mounted:
            subprocess.run(["umount", str(mount)], check=False)
        image.unlink()


def shared(size: models.Size, folder: Path, runs: int) -> str:
    """Measure what shared blocks save on XFS."""
    print("XFS:", file=sys.stderr)
    title = "### On XFS, where blocks can be shared, the same model"
    with xfs(folder, 16 * 2**30) as mount:
        if mount is None:
            return f"{title}\n\nNot measured: only root can mount an image, with `mkfs.xfs`."
        places = _places(models.build(size, mount / size.name), mount)
        contenders = [
            STREAM_SYNCED,
            Contender("`run --engine stream --no-reflink`", own("--no-reflink", synced=True)),
            COPY_SYNCED,
            Contender(
                "`cp -r` of the base, which shares too, `sync -f`", CP[:2] + CP[3:], synced=True
            ),
        ]
        costs = in_turn(contenders, places, runs, shares=True)
        stream, result = costs[contenders[0]], grown(places)
    return "\n\n".join(
        (
            title,
            table(costs),
            (
                f"With shared blocks, `run --engine stream` takes {stream.wall:.2f} s and needs "
                f"new disk space for {stream.disk / result:.3%} of the output."
            ),
        )
    )


def startup(folder: Path, runs: int) -> str:
    """Measure how long `gen` takes to start."""
    print("start-up:", file=sys.stderr)
    places = _places(models.build(models.SMALL, folder / "small"), folder)
    contenders = [
        Contender("`gen`", (beside("mk-interleave"), "gen", DIRECTIVE, "--model", "{base}")),
        Contender("`mergekit-yaml --help`", (beside("mergekit-yaml"), "--help")),
    ]
    costs = in_turn(contenders, places, runs)
    gen, mergekit = (costs[contender] for contender in contenders)
    return "\n\n".join(
        (
            "### Start-up",
            table(costs),
            (
                f"`gen` takes {gen.wall / mergekit.wall:.3f} times as long as mergekit-yaml takes "
                "to start."
            ),
        )
    )


def machine() -> str:
    """Describe the machine of the measurement."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} processors, {memory:.0f} GiB of memory, {platform.system()} "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}"
    )


def spliced(page: str, begin: str, end: str, text: str) -> str:
    """Return a page with other text between two marks."""
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def publish(text: str, page: Path | None, begin: str, end: str) -> None:
    """Print the figures, and write them between two marks of a page."""
    print(text)
    if page is not None:
        page.write_text(spliced(page.read_text(encoding="utf-8"), begin, end, text), "utf-8")


def main() -> None:
    """Measure, print the figures, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="directory for models and results")
    parser.add_argument("--runs", type=int, default=7, help="runs of each command, an odd number")
    parser.add_argument("--page", type=Path, help="page to write the figures into")
    parser.add_argument("--sizes", default="small,middle,large")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {size.name: size for size in (models.SMALL, models.MIDDLE, models.LARGE)}
    parts = [
        f"Medians measured with `make bench`: {machine()}; all input files are in the page cache."
    ]
    for name in arguments.sizes.split(","):
        # A round of the large model takes minutes.
        runs = min(arguments.runs, 3) if name == "large" else arguments.runs
        parts.append(compare(sizes[name], folder, runs))
    parts.append(shared(models.MIDDLE, folder, arguments.runs))
    parts.append(at_once(models.MIDDLE, folder, arguments.runs))
    parts.append(proof(models.MIDDLE, folder, arguments.runs))
    parts.append(startup(folder, arguments.runs))
    text = "\n\n".join(parts)
    publish(text, arguments.page, BEGIN, END)


if __name__ == "__main__":
    main()
