"""Runs untrusted Python programs: bubblewrap, a seccomp filter, resource limits (docs/sandbox.md)."""
