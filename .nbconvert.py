"""How the README's first command runs the notebook.

Nothing that differs from run to run is saved, and the terminal shows each section as
it starts, with the seconds since the first and, once training has been timed, the
minutes left.
"""

import os
import re
import sys
import tempfile
import time

c = get_config()  # noqa: F821, nbconvert provides it
start = time.monotonic()
EVIDENCE = 10  # times as long as what comes before it, sections 1 to 6


def tell(text):
    print(text, file=sys.stderr, flush=True)


def announce(cell, cell_index):
    """Print a cell's heading when the run gets there."""
    heading = re.match(r"#+ ([^\n]+)", cell.source)
    if cell.cell_type == "markdown" and heading:
        seconds = time.monotonic() - start
        tell(f"{seconds:4.0f} s  {heading[1]}")
        if heading[1].startswith("7 ") and seconds > 10:
            tell(f"        about {seconds * EVIDENCE / 60:.0f} minutes left")


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
if os.name != "nt":  # the interprocess transport does not exist on Windows
    c.KernelManager.transport = "ipc"
    c.KernelManager.ip = os.path.join(tempfile.mkdtemp(), "kernel")  # its own sockets
