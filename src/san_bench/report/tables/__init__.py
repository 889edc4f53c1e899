"""Tables of results: what can be compared, means, intervals, paired differences."""
