class LayerNorm:
    """Named by Megatron-Core, built by none of the supported families."""
