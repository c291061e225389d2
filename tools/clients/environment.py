"""Make an environment with pinned packages, and run scripts in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "clients"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_LIMIT = 1800
"""The seconds after which a script is stopped."""


class ClientError(Exception):
    """A client could not be installed, or its script failed."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `.cache/clients`.

    Attributes:
        name: Its name; `requirements/<name>.txt` lists its packages.
    """

    name: str

    @property
    def _place(self) -> Path:
        return CACHE / self.name

    @property
    def _python(self) -> Path:
        return self._place / "bin" / "python"

    @property
    def requirements(self) -> Path:
        """The file with the pinned packages."""
        return HERE / "requirements" / f"{self.name}.txt"

    def version(self, package: str) -> str:
        """Return the version of a package that the file pins."""
        text = self.requirements.read_text(encoding="utf-8")
        found = re.search(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE | re.IGNORECASE)
        if found is None:
            raise ClientError(f"{self.requirements.name} does not list {package}")
        return found[1]

    def source(self, package: str) -> Path:
        """Download the source distribution of a package that the file pins; return the archive.

        Raises:
            ClientError: It cannot be downloaded.
        """
        version = self.version(package)
        place = CACHE / f"{package}-{version}.tar.gz"
        if not place.is_file():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            words = ["--no-binary", package, "--dest", str(CACHE), f"{package}=={version}"]
            _check(_call([*pip, *words], {**os.environ}))
        return place

    def run(
        self, script: str, *words: str | Path, package: bool = False, folders: Sequence[Path] = ()
    ) -> Any:
        """Run a script of `inside/` and return the JSON value on its last line of output.

        Args:
            script: The name of the script.
            words: Its arguments.
            package: Whether the script imports this project's package.
            folders: Folders with modules that replace those of the environment.

        Raises:
            ClientError: The environment cannot be made, or the script fails.
        """
        _make(self)
        command = [self._python, HERE / "inside" / script, *words]
        environment = _without_python_variables() | _OFFLINE
        folders = [*folders, *([ROOT] if package else [])]
        if folders:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        done = _call([*map(str, command)], environment)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            raise ClientError(_last_line(done.stderr) or f"{script}: status {done.returncode}")
        return json.loads(lines[-1])


@cache
def _make(environment: Environment) -> None:
    """Make the environment, unless one with the same packages exists.

    Raises:
        ClientError: It cannot be made.
    """
    wanted = environment.requirements.read_text(encoding="utf-8")
    mark = environment._place / "installed.txt"  # noqa: SLF001 - the class is in this module
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        return
    place = str(environment._place)  # noqa: SLF001
    _check(_call([sys.executable, "-m", "venv", "--clear", place], _without_python_variables()))
    (site_packages,) = environment._place.glob("lib/python*/site-packages")  # noqa: SLF001
    pip = [str(environment._python), "-m", "pip", "install", "--no-deps", "--no-compile"]  # noqa: SLF001
    if not _lend_torch(site_packages):
        text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        _check(_call([*pip, *re.findall(r"^torch==\S+$", text, re.MULTILINE)], {**os.environ}))
    _check(_call([*pip, "-r", str(environment.requirements)], {**os.environ}))
    mark.write_text(wanted, encoding="utf-8")


def _lend_torch(site_packages: Path) -> bool:
    """Link the torch of the running Python into an environment, so that none is downloaded."""
    try:
        torch = distribution("torch")
    except PackageNotFoundError:
        return False
    for top in {file.parts[0] for file in torch.files or ()} - {"..", "__pycache__"}:
        (site_packages / top).symlink_to(str(torch.locate_file(top)))
    return True


def _call(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"it did not end within {_LIMIT} seconds") from error


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise ClientError(f"not installed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    """Return the last line of an error, which names the exception, in at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(ERROR|[\w.]*(Error|Exception|Interrupt)\b)", line)
    ]
    return (errors or lines or [""])[-1].replace(str(ROOT), ".")[:200]


def _without_python_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
