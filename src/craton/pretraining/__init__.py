"""Growing a model from nothing: its size, its shape, its training, and the law that its loss follows."""
