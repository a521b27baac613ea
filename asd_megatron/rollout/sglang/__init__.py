"""Rollouts from SGLang servers: `engine` on all ranks, `controller` on global rank 0, `client` for what is asked of
servers, `servers` for the processes themselves, `weight_sync` for the trainer's weights."""
