"""What a user runs to trust an installation."""
