"""mini-vision: eight tasks in VTAB's three groups, drawn on the fly."""
