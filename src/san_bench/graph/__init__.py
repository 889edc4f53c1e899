"""Show propagation graphs: as a tree, JSON, Graphviz DOT, SVG or an HTML page."""
