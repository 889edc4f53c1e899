"""Data of the runner: real data sets, and images that are drawn on the fly."""
