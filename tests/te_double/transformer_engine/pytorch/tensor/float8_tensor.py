from transformer_engine.pytorch.quantized_tensor import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """Of every recipe here; Transformer Engine has a class for each."""
