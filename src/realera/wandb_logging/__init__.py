"""Weights & Biases: logging of runs, and the panels of dashboards."""
