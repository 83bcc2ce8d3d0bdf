"""What every room may use: files, limits, progress, tables, plots. Nothing here knows a model."""
