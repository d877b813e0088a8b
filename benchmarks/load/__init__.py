"""Load on the control plane: what `python -m benchmarks.load` measures, on a real PostgreSQL server."""
