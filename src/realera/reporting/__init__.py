"""From metrics to what people read: pages, tables, charts and image sheets."""
