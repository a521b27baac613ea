"""Runs Python programs that nobody has read: bubblewrap, a seccomp filter, resource limits (docs/sandbox.md)."""
