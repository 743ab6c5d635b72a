"""A run or a comparison to look at: one HTML page that loads nothing, and the same figures as PNG.

- `outputs`: what an output is, and the file that is written
- `of_comparison`, `of_run`, `of_meta`, `of_result`: what is said of each;  `subspace`: of a basis and coefficients
- `reading`: checked values from files;  `parts`: sections, tables, charts
- `axes`: the mathematics of a figure;  `svg`, `page`, `png`: how it is drawn
"""

from .outputs import report_on, write_page
from .parts import Report
from .png import write_figures

__all__ = ["Report", "report_on", "write_figures", "write_page"]
