"""Tasks: what a model learns. One file per task."""
