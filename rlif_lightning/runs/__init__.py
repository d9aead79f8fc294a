"""What a run leaves behind: its folder, metrics, curves, tables."""
