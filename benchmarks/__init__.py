"""Benchmarks: one script per claim, each writes a CSV and a picture."""
