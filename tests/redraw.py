"""Draw Figures 1 to 4 again from figures/run.pt: python tests/redraw.py"""

from extract import SETUP, extract

extract(*SETUP, "run", "losses-figure", "samples-figure")
