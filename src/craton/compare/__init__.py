"""Prompt, retrieve or fine-tune: the ways to adapt a model, compared on a user's own task."""
