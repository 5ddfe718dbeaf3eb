"""Trackers of runs (W&B, TensorBoard, CSV, MLflow, a Lightning logger of the user's), and W&B's dashboards."""
