"""Reports on rows and run folders: tables, figures and pages."""
