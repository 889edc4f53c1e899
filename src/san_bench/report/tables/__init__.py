"""Build tables of results: means, confidence intervals, paired differences and cost."""
