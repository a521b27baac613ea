"""A CPU stand-in for the package `sgl_kernel` (wheel sglang-kernel, CUDA only): every name imports, every call raises.

SGLang imports kernels by name all over its modules, whether it calls them or not. With `--attention-backend
torch_native` a float32 or bfloat16 text model, with experts or without, never does.

With `--enable-return-routed-experts` SGLang also pins host memory for copies from a GPU, whatever the device is.
Without CUDA in torch there is nothing to pin it for, so that request succeeds without doing anything.
"""

import torch

__version__ = "0.4.10"  # of the wheel that SGLang 0.5.23 pins


class _HostMemory:
    """The part of torch's `cudart` that pins memory; 0 is cudaSuccess."""

    def cudaHostRegister(self, address, size, flags):
        return 0

    def cudaHostUnregister(self, address):
        return 0


if torch.version.cuda is None:
    torch.cuda.cudart = _HostMemory


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel: this is the stand-in of the CPU environment")

    kernel.__name__ = kernel.__qualname__ = name
    return kernel
