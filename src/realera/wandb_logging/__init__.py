"""Weights & Biases: the run that is logged, and the panels of its dashboards."""
