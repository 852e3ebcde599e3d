"""Training a model that segments what a click or a box means, on exact masks."""
