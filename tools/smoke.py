"""Install the wheel into empty environments, one for each Python, and use it as README shows.

The Pythons are those that `pyproject.toml` names and that are found here: the one that runs this,
`python3.X` on PATH, and those installed beside the one that runs this, as pyenv, uv and the like
keep them. Torch is borrowed from the Python that runs this by an environment of the same version;
the others install it, or do without it and test what needs no torch (`--no-torch-download`).
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
# A Debian python3 may lack ensurepip, and a pyenv shim may stand for a Python that is not selected.
PROBE = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info))"
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
# Written with numpy, since an environment may have no torch.
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
        found = shutil.which(command, path=self.place / BIN)
        if not found:
            sys.exit(f"{self.place}: it has no command {command}")
        ended = subprocess.run(
            [found, *words],
            cwd=self.folder,
            env=surroundings() | {"HF_HUB_OFFLINE": "1"},
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if ended.returncode:
            sys.exit(f"{found} {' '.join(map(str, words))}: {ended.stdout}{ended.stderr}")
        return ended.stdout

    def pip(self, *words: str | Path) -> None:
        """Install, held to the constraints file.

        Modules are not compiled: most of the thousands that are installed are never imported.
        """
        held = ("--constraint", CONSTRAINTS, "--no-compile")
        self("python", "-m", "pip", "install", "--disable-pip-version-check", *held, *words)


def surroundings() -> dict[str, str]:
    """The environment variables, without those that would show the checkout to the installed.

    UTF-8 mode is set because Windows gives a pipe an encoding that lacks the arrow of `plan`.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "MK_INTERLEAVE_"))
    } | {"PYTHONUTF8": "1"}


def expect(what: str, found: Any, wanted: Any) -> None:
    """Exit if something is not as it must be."""
    if found != wanted:
        sys.exit(f"{what}: expected {wanted!r}, found {found!r}")


def version_of(python: str | Path) -> str | None:
    """Which Python this is, such as 3.12; None if it does not start or cannot make environments."""
    try:
        command = [python, "-c", PROBE]
        ended = subprocess.run(
            command, env=surroundings(), capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def candidates(version: str) -> Iterator[str | Path]:
    """Where a Python of this version may be."""
    for folder in os.get_exec_path():
        if found := shutil.which(f"python{version}", path=folder):
            yield found
    yield from sorted(Path(sys.base_prefix).parent.glob(f"*/bin/python{version}"))


def pythons() -> dict[str, str | Path]:
    """The Pythons of this machine that the project supports, by version."""
    found: dict[str, str | Path] = {"{}.{}".format(*sys.version_info): sys.executable}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for version in re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text):
        if version not in found:
            usable = (path for path in candidates(version) if version_of(path) == version)
            if python := next(usable, None):
                found[version] = python
            else:
                print(f"Python {version}: not found on this machine, not tested")
    return found


def build(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], env=surroundings(), check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """Check that the wheel holds every file of the package and no other.

    py.typed must be one of them: the classifier `Typing :: Typed` promises it.
    """
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {PACKAGE / "py.typed", *(path for path in PACKAGE.rglob("*") if path.is_file())}
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    expect("files that only the wheel or only the package has", sorted(packed ^ wanted), [])


def installed(name: str) -> Distribution | None:
    """What the Python that runs this has of that name."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def requirements(of: Distribution) -> list[str]:
    """What it requires, without its extras."""
    return [line for line in of.requires or () if "extra ==" not in line]


def lend_torch(place: Path) -> None:
    """Link torch of the Python that runs this, and what it requires, into an environment.

    Which build of torch is right depends on the machine, and the index knows only one, of several
    gigabytes: whoever chose another has it here and nowhere else. pip finds these links, and
    neither downloads nor changes what they lead to.
    """
    wanted = ["torch"]
    for name in wanted:
        lent = installed(name)
        if not lent:
            continue  # it is required on other systems only
        for top in {file.parts[0] for file in lent.files or ()} - {"..", "__pycache__"}:
            if not (place / top).exists():  # several distributions may share a folder
                (place / top).symlink_to(str(lent.locate_file(top)))
        names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements(lent)]
        wanted += [name for name in names if name not in wanted]


def stand_in_for_torch(place: Path) -> None:
    """Let pip take torch for installed, with the requirements that it has here, if it is here."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\S+)$", text, re.MULTILINE)
    lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
    here = installed("torch")
    lines += [f"Requires-Dist: {line}" for line in (requirements(here) if here else ())]
    folder = place / f"torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(environment: Environment, version: str, *, download_torch: bool) -> bool:
    """Prepare an empty environment for the wheel; return whether torch is to be tested too."""
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
    """Use the commands that a user starts with, from `--version` to `explain`."""
    where = "import mergekit_interleave as m; print(m.__file__)"
    found = Path(environment("python", "-c", where).strip())
    expect("in the environment", found.is_relative_to(environment.place), wanted=True)
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
    forward = ["--forward"] if torch else []
    for engine in ("mergekit", "stream") if torch else ("stream",):
        options = ("--model", "base", "--engine", engine)
        environment("mk-interleave", "run", directive, engine, *options)
        environment("mk-interleave", "verify", engine, "--against", "base", *forward)
        explained = environment("mk-interleave", "explain", engine)
        expect("explain", directive in explained.splitlines(), wanted=True)


def smoke(wheel: Path, python: str | Path, place: Path, *, download_torch: bool) -> str:
    """Install the wheel for one Python and use it; return what was tested."""
    begun = time.monotonic()
    version = version_of(python)
    if not version:
        sys.exit(f"{python}: it does not start, or cannot make environments")
    shutil.rmtree(place / version, ignore_errors=True)
    command = [python, "-m", "venv", place / version]
    subprocess.run(command, env=surroundings(), check=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(place / version, Path(folder))
        torch = make(environment, version, download_torch=download_torch)
        environment.pip(wheel)
        # The tools of a developer are resolved only.
        environment.pip("--dry-run", f"{wheel}[dev]")
        use(environment, wheel.name.split("-")[1], torch=torch)
    without = (
        "" if torch else "; not tested, for want of torch: --engine mergekit, verify --forward"
    )
    seconds = time.monotonic() - begun
    return f"Python {version}: {wheel.name} works in an empty environment, {seconds:.0f} s{without}"


def main() -> None:
    """Read the command line, then build, install and use; two Pythons at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("environments", type=Path, help="where the environments are made")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="test this; default: build one")
    parser.add_argument(
        "--python",
        action="append",
        metavar="PYTHON",
        help="test with this one, repeatable; default: each that is found",
    )
    parser.add_argument(
        "--no-torch-download",
        action="store_true",
        help="where torch cannot be borrowed, test without it",
    )
    words = parser.parse_args()
    place = words.environments.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = words.wheel.resolve() if words.wheel else build(Path(scratch))
        check_files(wheel)
        one = partial(smoke, wheel, place=place, download_torch=not words.no_torch_download)
        with ThreadPoolExecutor(max_workers=2) as pool:
            for tested in pool.map(one, words.python or pythons().values()):
                print(tested, flush=True)


if __name__ == "__main__":
    main()
