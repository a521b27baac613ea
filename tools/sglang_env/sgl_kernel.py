"""A CPU stand-in for the package `sgl_kernel` (wheel sglang-kernel, CUDA only): every name imports, every call raises.

SGLang imports kernels by name all over its modules, whether it calls them or not. With `--attention-backend
torch_native` a dense float32 or bfloat16 model never does.
"""

__version__ = "0.4.10"  # of the wheel that SGLang 0.5.23 pins


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel: this is the stand-in of the CPU environment")

    kernel.__name__ = kernel.__qualname__ = name
    return kernel
