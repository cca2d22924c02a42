"""Reproducible benchmarks: the same work on loraserve and on an installed peer, in turn, in one run."""
