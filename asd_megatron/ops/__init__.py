"""Vocabulary-parallel and distributed math on explicit process groups, independent of models and of the method."""
