"""Another device than the CPU, for machines that have none: what is on it cannot be mixed with what is on the CPU, as with CUDA.

Its tensors say that they are on "meta" and keep their numbers on the CPU. ``python tests/other_device.py PPO`` lets an agent learn on
both, and prints by how much weights and answers differ.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

COPIES = ("aten::_to_copy", "aten::copy_")
FOREIGN = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # CUDA takes indices from the CPU


class Elsewhere(torch.Tensor):
    """A tensor of that device."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=torch.device("meta"),
        )
        made.elem = elem
        return made

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def item(self) -> Any:
        return self.detach().cpu().item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __deepcopy__(self, memo: Any) -> Any:
        copied: Any = Elsewhere(self.elem.detach().clone())
        return torch.nn.Parameter(copied, self.requires_grad) if getattr(self, "_is_param", False) else copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, refused where it mixes devices."""
    name, device = func._schema.name, kwargs.get("device")
    given: list[torch.Tensor] = []
    tree_map(lambda x: given.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
    any_here = any(isinstance(x, Elsewhere) for x in given)
    if any_here and name not in COPIES + FOREIGN:
        strangers = [x.shape for x in given if not isinstance(x, Elsewhere) and x.dim()]
        if strangers:
            raise RuntimeError(
                f"expected all tensors to be on the same device: {name} got one of the CPU, {strangers[0]}"
            )
    if any(x.is_meta and not isinstance(x, Elsewhere) for x in given):
        raise RuntimeError(f"{name} got a tensor without numbers")
    there, kept = tree_map(lambda x: x.elem if isinstance(x, Elsewhere) else x, (args, kwargs))
    if device is not None:
        kept = {**kept, "device": torch.device("cpu")}
    out = func(*there, **kept)
    if name == "aten::copy_":
        return args[0]
    stays = any_here if device is None else torch.device(device).type == "meta"
    same = {id(x.elem): x for x in given if isinstance(x, Elsewhere)}  # of operations in place

    def back(x: Any) -> Any:
        return same.get(id(x), Elsewhere(x) if stays else x) if isinstance(x, torch.Tensor) else x

    return tree_map(back, out)


class Mode(TorchDispatchMode):
    """Lets tensors be made on that device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def learnt(name: str, device: str) -> dict[str, Any]:
    """Weights and answers of an agent that has learnt on a device."""
    from test_algorithms import ALL, CONTINUOUS, QUESTIONS, environment, make, network

    from sb3_qa import QuestionAnswerer
    from sb3_qa.callbacks import QACallback
    from sb3_qa.policies import qa_policy

    algorithm: Any = next(each for each in ALL if each.__name__ == name)
    net = {**network(algorithm, "vector", True), "questions": QUESTIONS, "qa_coef": 0.5}
    model = make(algorithm, qa_policy(algorithm), environment(algorithm), net, device=device)
    model.learn(64, callback=QACallback())
    assert model.policy.qa_head.flat.device.type == device
    obs = environment(algorithm).reset()
    action = np.zeros((2, 1), np.float32) if algorithm in CONTINUOUS else None
    qa = QuestionAnswerer.from_model(model)
    asked = qa.ask("low[k=4]", obs, action).probability, qa.ask("far", obs).mean
    told = {str(n): np.asarray(answer) for n, answer in enumerate(asked)}
    return told | {key: value.cpu().numpy() for key, value in model.policy.state_dict().items()}


def main(name: str) -> None:
    """Learn on both, and tell the largest difference."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    here = learnt(name, "cpu")
    torch.__future__.set_swap_module_params_on_conversion(True)
    import torch.optim.adam as adam
    import torch.optim.optimizer as optimizer

    for module in (adam, optimizer):
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            module._get_fused_kernels_supported_devices = lambda: ["cpu", "meta"]
    with Mode():
        there = learnt(name, "meta")
    print(max(float(np.abs(here[key] - there[key]).max()) for key in here))


if __name__ == "__main__":
    main(sys.argv[1])
