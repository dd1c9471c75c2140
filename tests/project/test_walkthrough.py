"""minillava/walkthrough.ipynb: every cell runs, every stage finds itself equal to the model, and
what is stored is what comes out."""

import json

import pytest
from commands import python
from paths import ROOT

NOTEBOOK = ROOT / "minillava" / "walkthrough.ipynb"

# In a process of its own: a notebook's kernel brings event loops and warnings of its own.
RUN = """
import sys
import tempfile
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs = []
with tempfile.TemporaryDirectory() as short:  # sockets in a folder: somebody may take a free port
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{short}/kernel")
    where = {"metadata": {"path": sys.argv[2]}}
    NotebookClient(notebook, km=kernel, startup_timeout=600, resources=where).execute()
nbformat.write(notebook, sys.argv[3])
"""


def printed(notebook: dict) -> list[str]:
    """Per code cell, the text that it printed."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        "".join("".join(out["text"]) for out in cell["outputs"] if out.get("name") == "stdout")
        for cell in cells
    ]


def test_every_stage_equals_the_model_and_the_stored_outputs_are_true(tmp_path):
    """A renamed function, or a stage that no longer computes what the model does, would leave a
    notebook that teaches something false."""
    pytest.importorskip(
        "nbclient", reason="pip install -e '.[test]' brings nbclient, which runs the notebook"
    )
    pytest.importorskip(
        "ipykernel", reason="pip install -e '.[test]' brings ipykernel, which runs the notebook"
    )
    copy = tmp_path / "done.ipynb"
    done = python("-W", "ignore", "-c", RUN, NOTEBOOK, ROOT, copy)
    assert done.returncode == 0, done.stderr[-2000:]
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    made = printed(json.loads(copy.read_text(encoding="utf-8")))
    stages = [cell for cell in stored["cells"] if "".join(cell["source"]).startswith("## ")]
    checks = [line for text in made for line in text.splitlines() if line.startswith("check:")]
    assert set(checks) == {"check: True"}
    # one for each stage; the tower has two, the last heading has none
    assert len(checks) == len(stages)
    assert made == printed(stored)
