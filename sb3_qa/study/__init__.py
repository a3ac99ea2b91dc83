"""The empirical premises, measured: tasks, environments and runs."""
