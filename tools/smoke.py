"""Install the wheel into an empty environment for each Python, and use it as README shows.

The Pythons are those that `pyproject.toml` names and that exist on this machine: the one that runs
this script, `python3.X` on PATH, and those installed beside the running one, as pyenv and uv do.
An environment for the running Python's version borrows torch from it. The others install torch,
or, with `--no-torch-download`, test only what needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_interleave"
CONSTRAINTS = ROOT / "constraints.txt"
BIN = "Scripts" if os.name == "nt" else "bin"
# A Debian python3 may lack ensurepip, and a pyenv shim fails if its Python is not selected.
PROBE = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info))"
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
# numpy writes the model, because an environment may have no torch.
LLAMA = """
import numpy
from safetensors.numpy import save_file
from transformers import LlamaConfig

LlamaConfig(
    num_hidden_layers=8, hidden_size=64, intermediate_size=96, vocab_size=128,
    num_attention_heads=4, num_key_value_heads=2,
    architectures=["LlamaForCausalLM"], dtype="float32",
).save_pretrained("base")
shapes = {"model.embed_tokens": (128, 64), "model.norm": (64,), "lm_head": (128, 64)}
for layer in range(8):
    for name, shape in {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96), "input_layernorm": (64,), "post_attention_layernorm": (64,),
    }.items():
        shapes[f"model.layers.{layer}.{name}"] = shape
draw = numpy.random.default_rng(0).standard_normal
tensors = {f"{name}.weight": draw(shape, "float32") / 8 for name, shape in shapes.items()}
save_file(tensors, "base/model.safetensors", {"format": "pt"})
"""
AS_JSON = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"


@dataclass(frozen=True)
class Environment:
    """Runs commands of a virtual environment in a folder outside the checkout."""

    place: Path
    folder: Path

    def __call__(self, command: str, *words: str | Path, stdin: str = "") -> str:
        """Run a command and return what it prints; exit if it fails."""
        program = shutil.which(command, path=self.place / BIN)
        if not program:
            sys.exit(f"{self.place}: has no command {command}")
        done = subprocess.run(
            [program, *words],
            cwd=self.folder,
            env=surroundings() | {"HF_HUB_OFFLINE": "1"},
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            sys.exit(f"{program} {' '.join(map(str, words))}: {done.stdout}{done.stderr}")
        return done.stdout

    def pip(self, *words: str | Path) -> None:
        """Install under the constraints file.

        Modules are not compiled, because most of those installed are never imported.
        """
        options = ("--disable-pip-version-check", "--constraint", CONSTRAINTS, "--no-compile")
        self("python", "-m", "pip", "install", *options, *words)


def surroundings() -> dict[str, str]:
    """Return the environment variables without those that could expose the checkout.

    UTF-8 mode is set because Windows gives a pipe an encoding that lacks the arrow of `plan`.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "MK_INTERLEAVE_"))
    } | {"PYTHONUTF8": "1"}


def expect(what: str, found: Any, wanted: Any) -> None:
    """Exit if a value is not the expected one."""
    if found != wanted:
        sys.exit(f"{what}: expected {wanted!r}, found {found!r}")


def version_of(python: str | Path) -> str | None:
    """Return a Python's version, such as 3.12; None if it cannot start or make environments."""
    try:
        command = [python, "-c", PROBE]
        done = subprocess.run(
            command, env=surroundings(), capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def candidates(version: str) -> Iterator[str | Path]:
    """Yield the places where a Python of this version may be."""
    for folder in os.get_exec_path():
        if python := shutil.which(f"python{version}", path=folder):
            yield python
    yield from sorted(Path(sys.base_prefix).parent.glob(f"*/bin/python{version}"))


def pythons() -> dict[str, str | Path]:
    """Find the Pythons of this machine that the project supports, by version."""
    found: dict[str, str | Path] = {"{}.{}".format(*sys.version_info): sys.executable}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for version in re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text):
        if version not in found:
            usable = (path for path in candidates(version) if version_of(path) == version)
            if python := next(usable, None):
                found[version] = python
            else:
                print(f"Python {version}: not tested, because this machine does not have it")
    return found


def build(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], env=surroundings(), check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """Check that the wheel contains exactly the files of the package.

    py.typed must be one of them, because the classifier `Typing :: Typed` promises it.
    """
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {PACKAGE / "py.typed", *(path for path in PACKAGE.rglob("*") if path.is_file())}
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    expect("files in only one of wheel and package", sorted(packed ^ wanted), [])


def installed(name: str) -> Distribution | None:
    """Return the distribution that the running Python has under a name, if any."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def requirements(package: Distribution) -> list[str]:
    """Return the requirements of a distribution, without its extras."""
    return [line for line in package.requires or () if "extra ==" not in line]


def lend_torch(place: Path) -> None:
    """Link the running Python's torch and its requirements into an environment.

    The right build of torch depends on the machine. The package index offers one build, of several
    gigabytes; a machine with another build has it only in the running Python. pip finds the links,
    and neither downloads torch nor changes the linked files.
    """
    wanted = ["torch"]
    for name in wanted:
        lent = installed(name)
        if not lent:
            continue  # a requirement on other systems only
        for top in {file.parts[0] for file in lent.files or ()} - {"..", "__pycache__"}:
            if not (place / top).exists():  # several distributions may share a folder
                (place / top).symlink_to(str(lent.locate_file(top)))
        names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements(lent)]
        wanted += [name for name in names if name not in wanted]


def stand_in_for_torch(place: Path) -> None:
    """Make pip believe that torch is installed, with the requirements that it has here, if any."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\S+)$", text, re.MULTILINE)
    lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
    torch = installed("torch")
    lines += [f"Requires-Dist: {line}" for line in (requirements(torch) if torch else ())]
    folder = place / f"torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(environment: Environment, version: str, *, download_torch: bool) -> bool:
    """Prepare an empty environment for the wheel; return whether torch will be tested."""
    place = Path(environment("python", "-c", SITE_PACKAGES).strip())
    same = version == "{}.{}".format(*sys.version_info)
    # Windows lets only administrators make symbolic links.
    if same and installed("torch") and os.name != "nt":
        lend_torch(place)
        return True
    if not download_torch:
        stand_in_for_torch(place)
    return download_torch


def use(environment: Environment, version: str, *, torch: bool) -> None:
    """Run the commands that a new user starts with, from `--version` to `explain`."""
    where = "import mergekit_interleave as m; print(m.__file__)"
    module = Path(environment("python", "-c", where).strip())
    expect("module in the environment", module.is_relative_to(environment.place), wanted=True)
    expect(
        "--version", environment("mk-interleave", "--version").split(), ["mk-interleave", version]
    )
    words = ("--every", "4", "--layers", "32", "--model", "org/name")
    written = environment("mk-interleave", "gen", *words)
    slices = json.loads(environment("python", "-c", AS_JSON, stdin=written))["slices"]
    layers = [source["layer_range"] for part in slices for source in part["sources"]]
    ends = range(4, 33, 4)
    expect("gen", layers, [pair for end in ends for pair in ([end - 4, end], [end - 1, end])])
    schema = json.loads(environment("mk-interleave", "schema"))
    expect("schema", "interleave" in schema["properties"], wanted=True)

    environment("python", "-c", LLAMA)
    directive = "interleave: every 4"
    environment("mk-interleave", "plan", directive, "--model", "base", "--svg", "layers.svg")
    drawn = (environment.folder / "layers.svg").read_text(encoding="utf-8")
    expect("plan --svg", drawn[:4], "<svg")
    # `run` builds the model's class, which needs torch.
    for engine in ("mergekit", "stream") if torch else ():
        options = ("--model", "base", "--engine", engine)
        environment("mk-interleave", "run", directive, engine, *options)
        environment("mk-interleave", "verify", engine, "--against", "base", "--forward")
        explained = environment("mk-interleave", "explain", engine)
        expect("explain", directive in explained.splitlines(), wanted=True)


def smoke(wheel: Path, python: str | Path, place: Path, *, download_torch: bool) -> str:
    """Install the wheel for one Python and use it; return what was tested."""
    started = time.monotonic()
    version = version_of(python)
    if not version:
        sys.exit(f"{python}: cannot start, or cannot make environments")
    shutil.rmtree(place / version, ignore_errors=True)
    command = [python, "-m", "venv", place / version]
    subprocess.run(command, env=surroundings(), check=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(place / version, Path(folder))
        torch = make(environment, version, download_torch=download_torch)
        environment.pip(wheel)
        # A developer's tools are resolved but not installed.
        environment.pip("--dry-run", f"{wheel}[dev]")
        use(environment, wheel.name.split("-")[1], torch=torch)
    untested = "" if torch else "; without torch, run, verify and explain were not tested"
    seconds = time.monotonic() - started
    return (
        f"Python {version}: {wheel.name} works in an empty environment, {seconds:.0f} s{untested}"
    )


def main() -> None:
    """Read the command line, then build, install and use the wheel, with two Pythons at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("environments", type=Path, help="directory for the environments")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="wheel to test; default: build one"
    )
    parser.add_argument(
        "--python",
        action="append",
        metavar="PYTHON",
        help="Python to test with, repeatable; default: all that are found",
    )
    parser.add_argument(
        "--no-torch-download",
        action="store_true",
        help="test without torch if it cannot be borrowed",
    )
    arguments = parser.parse_args()
    place = arguments.environments.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = arguments.wheel.resolve() if arguments.wheel else build(Path(scratch))
        check_files(wheel)
        download_torch = not arguments.no_torch_download
        smoke_one = partial(smoke, wheel, place=place, download_torch=download_torch)
        with ThreadPoolExecutor(max_workers=2) as pool:
            for tested in pool.map(smoke_one, arguments.python or pythons().values()):
                print(tested, flush=True)


if __name__ == "__main__":
    main()
