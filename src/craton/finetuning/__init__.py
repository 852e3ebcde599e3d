"""Adapting a model to a task by training: adapters, quantised bases, and the tasks that join them with the loop."""
