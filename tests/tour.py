"""Runs docs/tour.ipynb and keeps what its cells say, without times and progress: `make tour`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(*more: str) -> nbformat.NotebookNode:
    """The notebook after a run in a kernel of its own, with further cells at its end."""
    notebook = nbformat.read(TOUR, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
    NotebookClient(notebook, timeout=500, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), TOUR)
