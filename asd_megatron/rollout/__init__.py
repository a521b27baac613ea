"""Rollouts: the engine protocol, the engine embedded in the trainer, the dump replay, and the collector of rewarded
groups."""
