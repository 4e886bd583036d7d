"""How the README's first command runs the notebook.

Nothing that differs from run to run is saved, and the terminal shows each section as
it starts, with the seconds since the first.
"""

import re
import sys
import time

c = get_config()  # noqa: F821, nbconvert provides it
start = time.monotonic()


def announce(cell, cell_index):
    """Print a cell's heading when the run gets there."""
    heading = re.match(r"(?:#+ |\*\*)([^\n*]+)", cell.source)
    if cell.cell_type == "markdown" and heading:
        seconds = time.monotonic() - start
        print(f"{seconds:4.0f} s  {heading[1]}", file=sys.stderr, flush=True)


def begin(notebook):
    """Say how long it will take; without the cells that work there is little to do."""
    work = any("work" in cell.metadata.get("tags", []) for cell in notebook.cells)
    estimate = "about 6 minutes on two cores" if work else "redrawing the figures"
    print(f"Running the notebook: {estimate}.", file=sys.stderr, flush=True)


c.ExecutePreprocessor.on_notebook_start = begin
c.ExecutePreprocessor.on_cell_start = announce
c.ExecutePreprocessor.record_timing = False
# After execution, join what one cell printed: how it was split depends on the clock.
c.NotebookExporter.preprocessors = [
    "nbconvert.preprocessors.CoalesceStreamsPreprocessor"
]
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.clear_cell_metadata = False
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {
    "kernelspec",
    ("language_info", "name"),
}
c.KernelManager.transport = "ipc"
