"""Reports of a run: metrics, dumps, progress, start-up and closing report, warnings, plots and the per-token report."""
