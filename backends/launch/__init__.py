"""Starting model servers as child processes of ours, so that none outlives what started it."""
