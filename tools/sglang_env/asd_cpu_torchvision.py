"""Lets PyPI's torchvision wheel, built against CUDA torch, be imported next to a CPU build of torch.

Its C extension cannot be loaded there, and its Python modules then stop at operators that nobody declared. So those are
declared, without an implementation, just before torchvision is imported. SGLang imports it and calls none of them for
a text model. Imported at the start of every Python of the environment through `asd_cpu_torchvision.pth`: it has to be
cheap, so torch is imported only when somebody asks for torchvision.
"""

import importlib.abc
import importlib.machinery
import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareOperators(importlib.abc.MetaPathFinder):
    library = None  # lives as long as the process: the declarations end with it

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
            type(self).library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(operator + SCHEMA)
        return importlib.machinery.PathFinder.find_spec(name, path, target)


sys.meta_path.insert(0, _DeclareOperators())
