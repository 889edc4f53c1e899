"""`san trace`: a propagation graph as a tree, JSON, Graphviz, an SVG or an HTML page."""
