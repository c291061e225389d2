"""The example notebooks run as committed, and their cells show the right results."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def _run(name: str, folder: Path, **environment: str) -> list[Any]:
    """Run a notebook in a new directory, and return its code cells."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        for variable, value in environment.items():
            patch.setenv(variable, value)
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert os.listdir(folder)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Run the notebook of the Python API."""
    return _run("python-api.ipynb", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def layout_cells(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Run the notebook that tries layouts, on a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("layouts")
    return _run("layouts.ipynb", folder, MK_INTERLEAVE_SMOLLM2=str(tiny))


def _shown(cells: list[Any], source: str) -> dict[str, Any]:
    """Return the output of the cell whose source ends with this text."""
    (cell,) = [cell for cell in cells if cell.source.endswith(source)]
    shown: dict[str, Any] = {}
    for output in cell.outputs:
        shown |= output.get("data", {})
        if output.output_type == "stream":
            shown[output.name] = shown.get(output.name, "") + output.text
    return shown


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_committed_without_outputs(notebook: Path) -> None:
    """A committed notebook has no outputs, because they are generated on each run."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_a_plan_is_shown_as_its_layer_map(cells: list[Any]) -> None:
    """A plan is shown as an SVG picture, with or without the weights."""
    for source in ("\nplan", 'model="org/name")'):
        assert _shown(cells, source)["image/svg+xml"].startswith("<svg")


def test_reports_are_shown(cells: list[Any]) -> None:
    """The reports show an exact model and only its new layers as trainable."""
    assert "'layers': 12" in _shown(cells, "report.as_dict()")["text/plain"]
    assert "'exact': True" in _shown(cells, "checked.forward")["text/plain"]
    assert "unfrozen_parameters" in _shown(cells, ".text)")["stdout"]
    assert "model.layers.2." in _shown(cells, "trainable[0]")["text/plain"]
    assert _shown(cells, 'sep="\\n")')["stdout"].startswith("DirectiveError\n")


def test_the_functions_print_nothing(cells: list[Any]) -> None:
    """The API prints nothing to standard output or standard error."""
    for cell in cells:
        if "mk." not in cell.source or "from_pretrained" in cell.source:
            continue  # transformers prints its own progress bars there
        streams = {output.name for output in cell.outputs if output.output_type == "stream"}
        assert streams <= ({"stdout"} if "print(" in cell.source else set()), cell.source


def test_layouts_are_compared(layout_cells: list[Any]) -> None:
    """Each layout has its picture and speaks beside the base, and zeroed layers change nothing."""
    (pictures,) = [cell.outputs for cell in layout_cells if "display(mk" in cell.source]
    assert [output.data["image/svg+xml"][:4] for output in pictures] == ["<svg"] * 3
    report = _shown(layout_cells, "print(report)")["stdout"]
    prompts = 2
    assert report.count("--- base, 8 layers\n") == prompts
    assert report.count(", 10 layers\n") == prompts * 3
    values = ast.literal_eval(_shown(layout_cells, "report.models}")["text/plain"])
    exact, *others = (value for name, value in values.items() if name != "base")
    assert exact == values["base"]
    assert all(other != exact for other in others)


def test_one_layout_is_kept(layout_cells: list[Any]) -> None:
    """The layout that is kept is exact, and computes what it computed in memory."""
    for source in ("against=source).is_exact", ".all())"):
        assert _shown(layout_cells, source)["text/plain"] == "True"
