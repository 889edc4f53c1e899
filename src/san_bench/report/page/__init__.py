"""The report of a suite as one self-contained HTML page."""
