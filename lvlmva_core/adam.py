"""Adam by torch's functional form: the optimiser's bits, without the compiler that `torch.optim.Optimizer` imports.

The first step of any `torch.optim.Optimizer` imports `torch._dynamo`, which takes about as long as importing torch
itself; a training of the size of the demo's would spend a third of its time there.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """`torch.optim.Adam`, or `AdamW` where `decoupled` (Kingma and Ba 2015; Loshchilov and Hutter 2019).

    fused: torch's fused kernel; on a CUDA device its rate and step counts live on the device, so that a captured graph
    sees them change.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        fused: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.capturable = fused and device.type == "cuda"
        self.learning_rate: float | Tensor = (
            torch.tensor(learning_rate, device=device) if self.capturable else learning_rate
        )
        self.settings: dict[str, Any] = {
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled,
            "fused": True if fused else None,  # None leaves the choice of a kernel to torch
        }
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), device=device if fused else "cpu") for _ in self.parameters]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient."""
        state = zip(self.parameters, self.means, self.squares, self.steps, strict=True)
        moved = [each for each in state if each[0].grad is not None]
        parameters, means, squares, steps = ([each[place] for each in moved] for place in range(4))
        adam(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.learning_rate,
            eps=EPSILON,
            maximize=False,
            capturable=self.capturable,
            **self.settings,
        )

    def set_learning_rate(self, rate: float) -> None:
        """Take another rate from the next step on."""
        if isinstance(self.learning_rate, Tensor):
            self.learning_rate.fill_(rate)
        else:
            self.learning_rate = rate

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes beside the parameters."""
        return {"means": self.means, "squares": self.squares, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name in ("means", "squares", "steps"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.copy_(saved)
