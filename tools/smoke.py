"""Install the wheel into an empty environment, and use it as README shows.

Usage: smoke.py ENVIRONMENT
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_interleave"
LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(
    num_hidden_layers=8, hidden_size=64, intermediate_size=96, vocab_size=128,
    num_attention_heads=4, num_key_value_heads=2,
)).save_pretrained("base")
"""
AS_JSON = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"


@dataclass(frozen=True)
class Shell:
    """Runs commands of an environment in a folder outside the checkout."""

    environment: Path
    folder: Path

    def __call__(self, command: str, *words: str | Path, stdin: str = "") -> str:
        """What a command prints; one that fails is the end."""
        ended = subprocess.run(
            [self.environment / "bin" / command, *words],
            cwd=self.folder,
            env=surroundings() | {"HF_HUB_OFFLINE": "1"},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            sys.exit(f"{command} {' '.join(map(str, words))}: {ended.stdout}{ended.stderr}")
        return ended.stdout


def surroundings() -> dict[str, str]:
    """The environment variables, without those that would show the checkout to the installed."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "MK_INTERLEAVE_"))
    }


def pip(*words: str | Path) -> None:
    """Call the pip of the interpreter that runs this."""
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], env=surroundings(), check=True)


def expect(what: str, found: Any, wanted: Any) -> None:
    """End where something is not as it must be."""
    if found != wanted:
        sys.exit(f"{what}: expected {wanted!r}, found {found!r}")


def build(folder: Path) -> Path:
    """The wheel, which holds every file of the package and no other.

    py.typed must be one of them: the classifier `Typing :: Typed` promises it.
    """
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {PACKAGE / "py.typed", *(path for path in PACKAGE.rglob("*") if path.is_file())}
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    expect("files that only the wheel or only the package has", sorted(packed ^ wanted), [])
    return wheel


def make(environment: Path, wheel: Path) -> None:
    """An environment that holds the wheel, what it requires, and nothing else."""
    venv.create(environment, clear=True, symlinks=True)
    lend_torch(environment)
    where, held = ("--python", environment), ("--constraint", ROOT / "constraints.txt")
    # Not compiled: of the thousands of modules that come along, most are never imported.
    pip(*where, "install", "--no-compile", *held, wheel)


def lend_torch(environment: Path) -> None:
    """Let the environment have the torch that this interpreter has, and what that requires.

    Which build of torch is right depends on the machine, and the index knows only one, of several
    gigabytes: whoever chose another has it here and nowhere else. pip takes for installed what it
    finds through these links, and neither downloads nor changes it.
    """
    place = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)}))
    wanted = ["torch"]
    for name in wanted:
        try:
            lent = distribution(name)
        except PackageNotFoundError:
            continue  # what is required elsewhere only
        for top in {file.parts[0] for file in lent.files or ()} - {"..", "__pycache__"}:
            if not (place / top).exists():  # several distributions may share a folder
                (place / top).symlink_to(str(lent.locate_file(top)))
        required = [line for line in lent.requires or () if "extra ==" not in line]
        names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required]
        wanted += [name for name in names if name not in wanted]


def use(shell: Shell, version: str) -> None:
    """The commands that a user starts with, from `--version` to `explain`."""
    place = Path(shell("python", "-c", "import mergekit_interleave as m; print(m.__file__)"))
    expect("in the environment", place.is_relative_to(shell.environment), wanted=True)
    expect("--version", shell("mk-interleave", "--version"), f"mk-interleave {version}\n")
    words = ("--every", "4", "--layers", "32", "--model", "org/name")
    written = shell("mk-interleave", "gen", *words)
    slices = json.loads(shell("python", "-c", AS_JSON, stdin=written))["slices"]
    layers = [source["layer_range"] for part in slices for source in part["sources"]]
    ends = range(4, 33, 4)
    expect("gen", layers, [pair for end in ends for pair in ([end - 4, end], [end - 1, end])])
    schema = json.loads(shell("mk-interleave", "schema"))
    expect("schema", "interleave" in schema["properties"], wanted=True)

    shell("python", "-c", LLAMA)
    directive = "interleave: every 4"
    shell("mk-interleave", "plan", directive, "--model", "base", "--svg", "layers.svg")
    expect("plan --svg", (shell.folder / "layers.svg").read_text()[:4], "<svg")
    for engine in ("mergekit", "stream"):
        shell("mk-interleave", "run", directive, engine, "--model", "base", "--engine", engine)
        shell("mk-interleave", "verify", engine, "--against", "base")
        found = shell("mk-interleave", "explain", engine)
        expect("explain", directive in found.splitlines(), wanted=True)


def main(environment: Path) -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        make(environment, wheel)
        use(Shell(environment, Path(scratch)), wheel.name.split("-")[1])
        print(f"{wheel.name}: installed into an empty environment, it works")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
