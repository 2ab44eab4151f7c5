"""Colours and markers of the pictures: Okabe and Ito's, told apart with any colour vision, each with its own marker.

Greys are fixed so that the page can swap them in dark mode.
"""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, GRID = "#24292e", "#636c76", "#d8dee4"
