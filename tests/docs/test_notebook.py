"""The example notebook runs as committed, and its cells show the right results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "python-api.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Run the notebook in a new directory, and return its code cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert os.listdir(folder)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _shown(cells: list[Any], source: str) -> dict[str, Any]:
    """Return the output of the cell whose source ends with this text."""
    (cell,) = [cell for cell in cells if cell.source.endswith(source)]
    shown: dict[str, Any] = {}
    for output in cell.outputs:
        shown |= output.get("data", {})
        if output.output_type == "stream":
            shown[output.name] = shown.get(output.name, "") + output.text
    return shown


def test_it_is_committed_without_outputs() -> None:
    """The committed notebook has no outputs, because they are generated on each run."""
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
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
