"""How the README's first command runs the notebook.

The terminal shows each section as it starts. Nothing is saved that differs from run to
run: no times, no versions, and of stderr nothing, which goes to the terminal instead.
"""

import re
import sys
import time

c = get_config()  # noqa: F821, nbconvert provides it
if "--inplace" in sys.argv:  # fails now, not after the run
    for notebook in [arg for arg in sys.argv if arg.endswith(".ipynb")]:
        try:
            open(notebook, "r+").close()
        except OSError as error:
            raise SystemExit(f"The run could not be saved: {error}") from error
start = time.monotonic()


def announce(cell, cell_index):
    """Print a cell's heading when the run gets there, and the seconds so far."""
    heading = re.match(r"#+ ([^\n]+)", cell.source)
    if cell.cell_type == "markdown" and heading:
        print(f"{time.monotonic() - start:4.0f} s  {heading[1]}", file=sys.stderr)


def take_stderr(cell, cell_index, execute_reply):
    """Move what a cell wrote to stderr from the notebook to the terminal."""
    for output in [o for o in cell.outputs if o.get("name") == "stderr"]:
        cell.outputs.remove(output)
        print(output.text, file=sys.stderr)


def drop_version(notebook, resources):
    """Leave out Python's version; scripts made of the notebook need the rest."""
    notebook.metadata.language_info.pop("version", None)
    return notebook, resources


c.KernelManager.transport_encryption = "auto"  # or kernels warn of its absence
c.ExecutePreprocessor.kernel_name = "python3"
c.ExecutePreprocessor.on_cell_start = announce
c.ExecutePreprocessor.on_cell_executed = take_stderr
c.ExecutePreprocessor.record_timing = False
c.NotebookExporter.preprocessors = [  # after execution
    drop_version,
    # Join what one cell printed: how it was split depends on the clock.
    "nbconvert.preprocessors.CoalesceStreamsPreprocessor",
]
