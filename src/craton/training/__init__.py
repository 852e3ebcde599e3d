"""The one training loop: objectives, optimisers, schedules, exact resume, distribution. It knows no method by name."""
