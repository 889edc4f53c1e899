"""Run benchmark suites on this machine or on a Ray cluster, and the demo."""
