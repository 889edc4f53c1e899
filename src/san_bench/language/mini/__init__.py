"""mini-language: eight forms of commonsense question about a small world."""
