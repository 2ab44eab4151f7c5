"""Benchmarks of TokenYield itself. `make perf` runs them; each module also runs alone: `python -m perf.<name>`."""
