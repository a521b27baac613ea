"""Lets a server on CPUs compute with block-wise FP8 weights in plain torch, as its GPU kernels do.

SGLang 0.5.23 has such layers on CPUs only with the AMX kernels of a `sgl_kernel` build for CPUs: without them
`Fp8LinearMethod` and `Fp8MoEMethod` end with an assertion once the weights are loaded. Here the weights stay as they
were loaded, which is what SGLang does with them on Hopper, and activations are quantised as there: each token's groups
of 128 to e4m3 with a scale of their own. Loading, updates and checksums of weights are SGLang's own. For tests: it is
slow.

Imported at the start of every Python of the environment through `asd_cpu_fp8.pth`: it has to be cheap, so it only waits
for the import of SGLang's module.
"""

import importlib.abc
import importlib.machinery
import sys

MODULE = "sglang.srt.layers.quantization.fp8"
GROUP = 128
E4M3_MAX = 448.0


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if module._is_cpu and not module._is_cpu_amx_available:
                _patch(module)

        spec.loader.exec_module = exec_module
        return spec


def _patch(module):
    linear, experts = module.Fp8LinearMethod, module.Fp8MoEMethod
    for method in (linear, experts):
        method.process_weights_after_loading_block_quant = lambda self, layer: None
    linear.apply = lambda self, layer, x, bias=None: _linear(x, layer.weight, layer.weight_scale_inv, bias)
    experts.apply = lambda self, layer, dispatch_output: _experts(layer, dispatch_output)


def _blocks(scale, weight):
    """The scale of each element: [..., rows / 128, columns / 128] -> [..., rows, columns]."""
    spread = scale.repeat_interleave(GROUP, dim=-2).repeat_interleave(GROUP, dim=-1)
    return spread[..., : weight.shape[-2], : weight.shape[-1]]


def _quantised(x):
    """`x` [tokens, columns] in float32 after e4m3 with one scale for each group of 128 columns of a token."""
    import torch

    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / E4M3_MAX
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def _linear(x, weight, scale, bias=None):
    import torch

    out = torch.nn.functional.linear(_quantised(x), weight.float() * _blocks(scale, weight))
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _experts(layer, dispatch_output):
    import torch
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x, (probabilities, chosen, _) = dispatch_output.hidden_states, dispatch_output.topk_output
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(layer.w13_weight.shape[0]):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            gate, up = _linear(x[token], layer.w13_weight[expert], layer.w13_weight_scale_inv[expert]).chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate.float()).to(x.dtype) * up
            out = _linear(hidden, layer.w2_weight[expert], layer.w2_weight_scale_inv[expert])
            total.index_add_(0, token, out.float() * probabilities[token, place, None].float())
    return StandardCombineInput(hidden_states=total.to(x.dtype))


sys.meta_path.insert(0, _PatchAfterImport())
