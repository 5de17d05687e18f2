"""The outer loop: `minimize`, its data, and its checkpoints."""
