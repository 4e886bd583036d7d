"""Runs a submission by nbclient, in a kernel of its own, and reads the notes of it."""

import ast
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from queue import Empty
from types import SimpleNamespace

import nbformat
import psutil
import torch
import watcher
from digits import write_digits
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelClient
from jupyter_client.connect import write_connection_file
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)

MEMORY = 8 * 2**30  # bytes for each submission
OUTPUT = 20_000_000  # characters of output that are kept
SIZES = {"few": (1080, 360), "real": (60_000, 10_000)}  # images to train and to test
RUNS = {"time", "timeit", "prun", "capture", "memit"}  # magics that run what follows


class Unreadable(Exception):
    """Says in one sentence why a file cannot be graded."""


class Note(SimpleNamespace):
    """Values by name."""


class Channels(AsyncKernelClient):
    """Asks the process itself whether it lives: heartbeats stop on a busy machine."""

    async def _async_is_alive(self):
        return self.process.is_alive()

    is_alive = _async_is_alive


class Client(NotebookClient):
    """Keeps no more output than a reader can use."""

    kept = 0

    def output(self, outs, msg, display_id, cell_index):
        self.kept += len(str(msg["content"]))
        if self.kept > OUTPUT:
            return None
        return super().output(outs, msg, display_id, cell_index)


def read(path):
    """The notebook in a file; of a script, one with a single cell."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        said = f"byte {error.start + 1} of the file is no UTF-8 text"
        raise Unreadable(f"{said}: save it as UTF-8") from None
    if path.suffix.lower() == ".py":
        try:
            with warnings.catch_warnings(action="ignore"):
                ast.parse(text)
        except (SyntaxError, ValueError) as error:
            old = "Missing parentheses in call to 'print'" in str(error)
            said = "a script for Python 2" if old else f"no valid Python: {error}"
            raise Unreadable(f"this is {said}") from None
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)])
    try:
        found = json.loads(text)
        version = found["nbformat"] if "cells" not in found else 4
    except (ValueError, KeyError, TypeError):
        raise Unreadable("this is not a notebook: its JSON cannot be read") from None
    if version != 4:
        raise Unreadable(
            f"the notebook has format {version}, from before 2015: save it anew"
        )
    kernel = found.get("metadata", {}).get("kernelspec", {})
    language = str(kernel.get("language") or kernel.get("name") or "python")
    if language.lower() in ("r", "ir", "julia", "scala", "javascript", "octave"):
        raise Unreadable(f"the notebook is written in {language}, not in Python")
    notebook = nbformat.v4.new_notebook()
    for cell in found["cells"]:
        source = "".join(cell.get("source", ""))
        if cell.get("cell_type") != "code":
            notebook.cells.append(nbformat.v4.new_markdown_cell(source))
        elif source.strip():
            count = cell.get("execution_count")
            notebook.cells.append(
                nbformat.v4.new_code_cell(source, execution_count=count)
            )
    return notebook


def plain(source):
    """The Python in a cell: magics that run what follows give it, others nothing."""
    lines, kept = source.lstrip().splitlines(), []
    head = re.match(r"%%(\w+)", lines[0]) if lines else None
    if head and head[1] not in RUNS:
        return ""
    for line in lines[1 if head else 0 :]:
        magic = re.match(r"(\s*)%(\w+)\s+(?:-\w+\s+)*(.*)", line)
        kept.append(magic[1] + magic[3] if magic and magic[2] in RUNS else line)
    return TransformerManager().transform_cell("\n".join(kept))


def trees(sources):
    """The syntax tree of each cell that has one."""
    found = []
    for source in sources:
        with contextlib.suppress(SyntaxError), warnings.catch_warnings(action="ignore"):
            found.append(ast.parse(plain(source)))
    return found


def imports(sources):
    """Names of the packages that are imported, and of those inside a `try`."""
    names, tried = set(), set()
    for tree in trees(sources):
        inside = [
            n
            for each in ast.walk(tree)
            if isinstance(each, ast.Try)
            for n in ast.walk(each)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {each.name.split(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = {node.module.split(".")[0]}
            else:
                continue
            names, tried = names | found, tried | (found if node in inside else set())
            names -= found if node in inside else set()
    return names, tried - names


def imported_by(path):
    """Modules that a file imports, if it can be read."""
    try:
        cells = read(path).cells
    except (Unreadable, OSError):
        return set()
    return imports([c.source for c in cells if c.cell_type == "code"])[0] - {path.stem}


def ansi(text):
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text or "")


@cache
def forkserver():
    """Where kernels are forked from, so that each need not import PyTorch anew."""
    context = multiprocessing.get_context("forkserver")
    installed = ["torchvision", "matplotlib.pyplot", "ipykernel.kernelapp"]
    context.set_forkserver_preload([*installed, "matplotlib_inline.backend_inline"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the kernels
    return context


@cache
def digits_at(size):
    """A folder with synthetic digits, kept until the program ends."""
    folder = tempfile.TemporaryDirectory(prefix="digits-")
    return write_digits(folder.name, *SIZES[size]), folder


async def answered(kc):
    """Wait until a kernel's answers get here; wait_for_ready takes seconds."""
    for pause in [0.1] * 600:
        kc.kernel_info()
        try:
            await kc.get_iopub_msg(timeout=pause)
            break
        except Empty:
            continue


async def execute(client, process, ready, notebook, seconds, outer):
    """Run the cells: the first error that is the submission's own ends it."""
    errors, ran, deadline = [], 0, time.monotonic() + seconds + 60
    kc = client.kc
    try:
        while not ready.exists() and process.is_alive():
            await asyncio.sleep(0.02)
        kc.start_channels()
        await answered(kc)
        client.reset_execution_trackers()
        client.timeout_func = lambda _: max(1, int(deadline - time.monotonic()))
        numbers = [n for n, c in enumerate(notebook.cells) if c.cell_type == "code"]
        for number, at in enumerate(numbers, start=1):
            try:
                await client.async_execute_cell(notebook.cells[at], at)
            except CellExecutionError as error:
                if error.ename == "SystemExit" and error.evalue in ("", "0", "None"):
                    break
                at = re.findall(
                    r"Cell In\s*\[(\d+)\], line (\d+)", ansi(error.traceback)
                )
                line = at[-1][1] if at and int(at[-1][0]) == number else ""
                errors.append(
                    Note(name=error.ename, text=error.evalue, cell=number, line=line)
                )
                if not outer(errors[-1]):
                    break
                continue
            ran += 1
    except CellTimeoutError:
        errors.append(Note(name="OutOfTime", text="it hangs", cell=ran + 1, line=""))
    except (DeadKernelError, RuntimeError):
        errors.append(Note(name="DeadKernel", text="it ended", cell=ran + 1, line=""))
    finally:
        kc.stop_channels()
    return errors, ran


def end_all(process, folder):
    """End the run's process group, and whatever else it started with its HOME."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if each.environ().get("HOME") == str(folder):
                each.kill()


def load(path):
    """The notes in the order of events."""
    notes = []
    with open(path, "rb") as file:
        while file.tell() < path.stat().st_size:
            try:
                notes += torch.load(file, weights_only=True)
            except Exception:  # noqa: BLE001, the last one was cut off
                break
    return sorted((Note(**each) for each in notes), key=lambda note: note.number)


def run(path, notebook, size, seconds, outer):
    """Run a notebook on digits: its notes, errors, and how many cells it ran."""
    digits, _ = digits_at(size)
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as top:
        folder, notes = Path(top, "home").resolve(), Path(top, "notes")
        folder.mkdir()
        for each in path.parent.glob("*.py"):
            if each != path and each.stat().st_size < 10**6:
                shutil.copy(each, folder)  # helper modules
        raw = shutil.copytree(digits.raw, Path(top, "raw"))
        connection, _ = write_connection_file(
            str(Path(top, "connection.json")), ip=str(Path(top, "k")), transport="ipc"
        )
        sources = [c.source for c in notebook.cells if c.cell_type == "code"]
        names = "folder", "notes", "raw", "connection", "name"
        places = folder, notes, raw, connection, path.name
        plan = dict(zip(names, map(str, places))) | {
            "seconds": seconds,
            "memory": MEMORY,
        }
        plan["tried"] = imports(sources)[1]
        process = forkserver().Process(target=watcher.start, args=[plan], daemon=True)
        process.start()
        try:
            client = Client(notebook)
            client.kc = Channels()
            client.kc.process = process
            client.kc.load_connection_file(connection)
            errors, ran = asyncio.run(
                execute(client, process, notes, notebook, seconds, outer)
            )
        finally:
            end_all(process, folder)
        found = load(notes) if notes.exists() else []
    return Note(notes=found, errors=errors, ran=ran, sources=sources, digits=digits)
