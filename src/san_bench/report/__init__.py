"""Report results: tables, figures and HTML pages."""
