"""Recipes, suites and protocols: strict YAML that defines a run. No torch."""
