"""Joining a model that sees and a language model: a projector that is trained alone."""
