"""Retrieval: documents to a searchable collection, questions to passages, answers whose every sentence is quoted."""
