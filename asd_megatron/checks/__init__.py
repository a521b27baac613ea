"""Checks of an installation that a user can run."""
