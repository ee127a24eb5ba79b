"""One comparison: its plan, tasks, execution, status, statistics and report."""
