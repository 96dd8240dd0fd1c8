"""What models are judged by: metrics for the library `evaluate`, each loaded by its path."""
