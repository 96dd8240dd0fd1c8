"""What a run reports: terminal, metrics.jsonl, trackers, plots, report.html."""
