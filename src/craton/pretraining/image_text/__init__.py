"""Training pictures and texts into one space, by contrast."""
