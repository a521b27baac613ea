from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

MOMENTS = (torch.float32, torch.bfloat16)


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose step count is the group's, and whose state does not exist before the first step.

    As the real one's: with `master_weights` parameters in bfloat16 are updated from float32 master weights, of which
    `store_param_remainders` keeps the lower 16 bits (rounded: a signed difference), and states in bfloat16 are computed
    with in float32.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter | dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert adam_w_mode and bias_correction and not (amsgrad or capturable)
        assert exp_avg_dtype in MOMENTS and exp_avg_sq_dtype in MOMENTS and master_weight_dtype is torch.float32
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode, self.capturable, self.master_weights = adam_w_mode, capturable, master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none is not False)
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if self.use_decoupled_grad:
                parameter.decoupled_grad = None

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros(param.shape, dtype=self.name_to_dtype_map[name])
        if self.master_weights:
            dtype = torch.int16 if store_param_remainders else torch.float32
            self.state[param]["master_param"] = torch.zeros(param.shape, dtype=dtype)
            if not store_param_remainders:
                self.set_scaled_state(param, "master_param", param.clone().detach().float())

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        state: Tensor = self.state[param][state_name]
        assert state.dtype is (torch.int16 if self._remains(param, state_name) else self.name_to_dtype_map[state_name])
        return state.float() if state.dtype is torch.bfloat16 else state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        remains = self._remains(param, state_name)
        assert unscaled_state.dtype is (torch.int16 if remains else torch.float32)
        if state_name not in self.state[param]:
            dtype = torch.int16 if remains else self.name_to_dtype_map[state_name]
            self.state[param][state_name] = torch.empty(param.shape, dtype=dtype)
        self.state[param][state_name].copy_(unscaled_state)

    def _remains(self, param: Tensor, state_name: str) -> bool:
        return self.store_param_remainders and state_name == "master_param" and param.dtype is torch.bfloat16

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for number, parameter in self._numbered(found["param_groups"]).items():
            if number in found["state"]:
                names = found["state"][number]
                found["state"][number] = {name: self.get_unscaled_state(parameter, name) for name in names}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # in the parameters' dtype
        for number, parameter in self._numbered(state_dict["param_groups"]).items():
            if number in state_dict["state"]:
                self.state[parameter] = {}
                for name, value in state_dict["state"][number].items():
                    self.set_scaled_state(parameter, name, value if self._remains(parameter, name) else value.float())

    def _numbered(self, groups: list[dict[str, Any]]) -> dict[int, Tensor]:
        numbers = chain.from_iterable(group["params"] for group in deepcopy(groups))
        return dict(zip(numbers, chain.from_iterable(group["params"] for group in self.param_groups), strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                gradient = parameter.decoupled_grad if self.use_decoupled_grad else parameter.grad
                if not self.state[parameter]:
                    self.initialize_state(parameter, self._remains(parameter, "master_param"))
                if gradient is not None:
                    self._update(parameter, gradient, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        moments = {name: self.get_unscaled_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
        weight = self._master(parameter)
        first, second = group["betas"]
        moments["exp_avg"].lerp_(gradient, 1 - first)
        moments["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = moments["exp_avg"] / (1 - first ** group["step"])
        deviation = (moments["exp_avg_sq"] / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, deviation, value=-group["lr"])
        for name, moment in moments.items():
            state[name].copy_(moment)
        if self._remains(parameter, "master_param"):
            bits = weight.view(torch.int32)
            upper = (bits + 0x8000) >> 16
            parameter.view(torch.int16).copy_(upper)
            state["master_param"].copy_(bits - (upper << 16))
        elif weight is not parameter:
            parameter.copy_(weight)

    def _master(self, parameter: Tensor) -> Tensor:
        """What is updated: the parameter, its master weight, or one made of its bits and its remainder's."""
        if "master_param" not in self.state[parameter]:
            return parameter
        master: Tensor = self.state[parameter]["master_param"]
        if self._remains(parameter, "master_param"):
            bits = (parameter.view(torch.int16).int() << 16) + master.int()
            return bits.view(torch.float32)
        return master
