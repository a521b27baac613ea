"""Sending the trainer's weights to running SGLang servers, and verifying that they arrived. Global rank 0 alone.

`synchronise` is the entry point; `distributed`, `cuda_ipc` and `disk` are the transports, `verification` compares
checksums and log-probs.
"""
