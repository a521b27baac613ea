"""Hugging Face folders in and out, and training checkpoints that a run resumes from."""
