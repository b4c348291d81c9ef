"""What a run costs before it is run: one formula each, with its source."""
