"""Draw Figures 1 to 4 again from figures/run.pt: python tests/redraw.py"""

import os

from extract import ROOT, SETUP, extract

os.chdir(ROOT)  # as a notebook runs in its own folder
extract(*SETUP, "run", "losses-figure", "samples-figure")
