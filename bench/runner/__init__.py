"""Runs cells: one engine in a process of its own per group of cells, resume, limits, progress."""
