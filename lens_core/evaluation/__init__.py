"""Measure a model: benchmark runs, statistics with intervals, reports, comparisons."""
