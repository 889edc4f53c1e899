"""Runs SAN and its peers on real tasks: the `san` command, recipes, data and reports."""
