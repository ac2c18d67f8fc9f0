"""Benchmarks: ratios measured in one run, written to ``benchmarks/results/<machine>/``."""
