"""Vocabulary-parallel and distributed math on explicit process groups. Knows nothing of models or methods."""
