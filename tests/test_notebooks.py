"""The notebooks run from top to bottom, with shorter training than a reader gets."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("name", ["quickstart", "dam"])
def test_notebook_is_ready_for_colab(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert f"/notebooks/{name}.ipynb" in notebook.cells[0].source
    assert "colab-badge" in notebook.cells[0].source
    installs = [cell.source for cell in notebook.cells if "pip install" in cell.source]
    assert len(installs) == 1
    # The JAX that a runtime comes with fits its accelerator: it must stay.
    assert "jax=={jax.__version__}" in installs[0]
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_quickstart_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert "steps = " in parameters.source
    parameters.source = "steps = 12"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "runs" / "quickstart" / "plots" / "masks.png").exists()


@pytest.mark.slow
def test_dam_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "dam.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert "length, rows, held_out_length = " in parameters.source
    parameters.source = "length, rows, held_out_length = 48, 2, 96"
    ran = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    tables = [
        output.data["text/markdown"]
        for cell in ran.cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert "| 96 | exact top |" in tables[0]
