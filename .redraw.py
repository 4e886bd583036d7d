"""Redraw every figure from figures/run.pt: jupyter nbconvert --config .redraw.py"""

import tempfile

load_subconfig(".nbconvert.py")  # noqa: F821, nbconvert provides it
c = get_config()  # noqa: F821
c.NbConvertApp.notebooks = ["cvae_mnist.ipynb"]
c.NbConvertApp.export_format = "notebook"
c.ExecutePreprocessor.enabled = True
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = {"work"}
c.FilesWriter.build_directory = tempfile.gettempdir()  # only the figures matter
