"""Text -> token files -> samples -> batches. Ranks, world sizes and worker counts arrive as integers."""
