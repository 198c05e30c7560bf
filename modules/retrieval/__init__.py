"""Sentence encoders and the texts that are found by their embeddings."""
