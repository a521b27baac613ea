"""The trainer's weights into running SGLang servers, with proof that they arrived. Global rank 0 alone.

`session.synchronise` is what an engine calls; `distributed`, `cuda_ipc` and `disk` are the ways that weights travel,
`receipt` is the proof.
"""
