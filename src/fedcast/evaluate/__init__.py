"""Evaluation: fixed windows, scores, baselines on the same windows, and statistics over result rows."""
