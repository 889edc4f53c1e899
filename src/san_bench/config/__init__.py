"""Recipes, suites and protocols: strict YAML, and what decides a run. No torch."""
