"""The engine that samples on the training model itself: KV cache, sampler, engine."""
