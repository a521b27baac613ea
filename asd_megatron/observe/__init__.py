"""What a run tells: metrics, dumps, progress, the start-up report, plots and the per-token report."""
