"""Prompting: prompt files, examples chosen for them, answers held to a form, and a search for the best of them."""
