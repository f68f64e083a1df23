"""Scores of a model: running a benchmark, statistics with intervals, reports, comparisons."""
