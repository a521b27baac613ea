"""Verifiers: from a problem and a response's text to a reward."""
