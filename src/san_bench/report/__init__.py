"""Reports: tables, plots and drawings."""
