"""Pages, tables, charts and image sheets from metrics."""
