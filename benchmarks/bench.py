"""Measure time, CPU and memory of the engines, side by side; prints ratios of one run.

It builds its own models (random weights, no torch), times processes in turn, and takes medians.
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

# The command; it may skip fsync, and write another number of files at once.
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
    """Something to time.

    Attributes:
        name: Its name in the table.
        command: Its words; {base} and {out} are replaced by directories.
        synced: Whether `sync -f` of its files is timed as well.
    """

    name: str
    command: tuple[str, ...]
    synced: bool = False


def own(*flags: str, synced: bool, at_once: int = 0, engine: str = "stream") -> tuple[str, ...]:
    """The command of this project."""
    words = ["run", DIRECTIVE, "{out}", "--model", "{base}", "--engine", engine, *flags]
    return (sys.executable, "-c", SCRIPT, "yes" if synced else "no", str(at_once), *words)


def beside(name: str) -> str:
    """A command of the current environment."""
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
    """Run a contender once, into a directory that does not exist before and after.

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
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}:\n{said.read().decode()}")
    disk = free - _free(out.parent) if shares else _allocated(out)
    shutil.rmtree(out, ignore_errors=True)
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, disk)


def _free(folder: Path) -> int:
    """The free space, once it no longer changes: XFS frees space in the background."""
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
    """Run all contenders in turn, several times; returns medians without the first round."""
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
    """A table of the costs."""
    lines = ["| | wall | CPU | peak memory | disk |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {contender.name} | {cost.wall:.2f} s | {cost.cpu:.2f} s | "
        f"{cost.peak / 2**20:,.0f} MiB | {cost.disk / 1e6:,.1f} MB |"
        for contender, cost in costs.items()
    ]
    return "\n".join(lines)


def size_of(path: Path) -> int:
    """The bytes of a model's weights."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def compare(size: models.Size, folder: Path, runs: int) -> str:
    """Compare the engines with each other and with a copy, at one size."""
    print(f"{size.name}:", file=sys.stderr)
    base = models.build(size, folder / size.name)
    places = _places(base, folder)
    costs = in_turn(ALL, places, runs)
    grown = _grown(places)
    per_byte = (costs[STREAM_SYNCED].wall / grown) / (costs[COPY_SYNCED].wall / size_of(base))
    stream, mergekit, synced = costs[STREAM], costs[MERGEKIT], costs[STREAM_SYNCED]
    return "\n\n".join(
        (
            (
                f"### {size_of(base) / 1e9:.1f} GB in {size.shards} "
                f"shard{'s' if size.shards > 1 else ''}, {size.layers} layers, "
                f"{grown / 1e9:.1f} GB grown; {runs} runs"
            ),
            table(costs),
            (
                f"Against mergekit-yaml, neither waiting for the disk: "
                f"**{mergekit.wall / stream.wall:.1f} times as fast**, "
                f"{mergekit.cpu / stream.cpu:.1f} times less CPU, "
                f"{mergekit.peak / stream.peak:.0f} times less memory. As it is, `run` waits and "
                f"checks, mergekit-yaml does neither: {mergekit.wall / synced.wall:.1f} times. "
                f"Against a copy, both waiting: **{per_byte:.2f}** times its time per byte of "
                "output."
            ),
        )
    )


def _places(base: Path, folder: Path) -> dict[str, str]:
    recipe = folder / f"{base.name}.yml"
    words = [beside("mk-interleave"), "gen", DIRECTIVE, "--model", str(base)]
    recipe.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return {"base": str(base), "recipe": str(recipe), "out": str(folder / "out")}


def _grown(places: dict[str, str]) -> int:
    """The bytes of the weights of the result."""
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
    cat, ours, _ = (costs[contender] for contender in contenders)
    return "\n\n".join(
        (
            "### Verify, the same model",
            table(costs),
            f"`verify` takes {ours.wall / cat.wall:.2f} times as long as `cat`, start-up included.",
        )
    )


@contextmanager
def xfs(folder: Path, size: int) -> Iterator[Path | None]:
    """Mount a new XFS image; None if it cannot be mounted."""
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
    """What shared blocks save, on XFS."""
    print("XFS:", file=sys.stderr)
    title = "### On XFS, where blocks can be shared, the same model"
    with xfs(folder, 16 * 2**30) as mount:
        if mount is None:
            return f"{title}\n\nLeft out: mounting an image takes root and `mkfs.xfs`."
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
        ours, grown = costs[contenders[0]], _grown(places)
    return "\n\n".join(
        (
            title,
            table(costs),
            (
                f"With shared blocks: {ours.wall:.2f} s, {ours.disk / grown:.3%} of the output "
                "as new disk."
            ),
        )
    )


def startup(folder: Path, runs: int) -> str:
    """How long `gen` takes to start."""
    print("start-up:", file=sys.stderr)
    places = {**_places(models.build(models.SMALL, folder / "small"), folder)}
    contenders = [
        Contender("`gen`", (beside("mk-interleave"), "gen", DIRECTIVE, "--model", "{base}")),
        Contender("`mergekit-yaml --help`", (beside("mergekit-yaml"), "--help")),
    ]
    costs = in_turn(contenders, places, runs)
    ours, theirs = (costs[contender] for contender in contenders)
    return "\n\n".join(
        (
            "### Start-up",
            table(costs),
            (
                f"`gen` takes {ours.wall / theirs.wall:.3f} of the time that mergekit-yaml takes "
                "to start."
            ),
        )
    )


def machine() -> str:
    """Where this was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} processors, {memory:.0f} GiB of memory, {platform.system()} "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}; everything that "
        "is read is in the page cache."
    )


def main() -> None:
    """Measure, print, and put the figures into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to put models and results")
    parser.add_argument("--runs", type=int, default=7, help="runs of each, an odd number")
    parser.add_argument("--page", type=Path, help="a page to put the figures into")
    parser.add_argument("--sizes", default="small,middle,large")
    wanted = parser.parse_args()
    folder = wanted.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {size.name: size for size in (models.SMALL, models.MIDDLE, models.LARGE)}
    parts = [f"Measured with `make bench`, medians: {machine()}"]
    for name in wanted.sizes.split(","):
        # The large one takes minutes a round.
        runs = min(wanted.runs, 3) if name == "large" else wanted.runs
        parts.append(compare(sizes[name], folder, runs))
    parts.append(shared(models.MIDDLE, folder, wanted.runs))
    parts.append(at_once(models.MIDDLE, folder, wanted.runs))
    parts.append(proof(models.MIDDLE, folder, wanted.runs))
    parts.append(startup(folder, wanted.runs))
    text = "\n\n".join(parts)
    print(text)
    if wanted.page:
        page = wanted.page.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        wanted.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
