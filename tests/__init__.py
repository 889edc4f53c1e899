"""The tests; a package, so that a `tests` folder that another project has installed does not take its place."""
