"""What fine-tuning minimises: classes, text vectors, preferences. Each is an `Objective` for the one loop."""
