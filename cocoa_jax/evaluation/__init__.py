"""Tasks, scores and the report."""
