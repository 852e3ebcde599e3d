"""Evaluation: tasks, metrics with their intervals, paired tests, and reports that open offline."""
