"""What one process and several that train together are compared by: the same calls, in both."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble
from lvlmva_core.data_parallel import number
from lvlmva_core.resume import Resume
from lvlmva_core.samples import Split
from lvlmva_core.store import Store
from lvlmva_core.training import train_classifier

N, N_ALIGN = 41, 11


class Net(nn.Module):
    """Convolutions, BatchNorm, and a parameter that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        # no bias before BatchNorm: its gradient is rounding alone, and Adam makes whole steps of it
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.Conv2d(4, 6, 3, 2, bias=False),
            nn.BatchNorm2d(6),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3))
        self.idle = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        if name == "norm":
            layers = [nn.Flatten(), nn.Linear(30, 6, bias=False), nn.BatchNorm1d(6, momentum=None), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(6, 3)).double()
        return Net().double()


def splits() -> tuple[Split, Split, Tensor]:
    """Training samples, an alignment set, masks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    images = 0.5 * torch.rand((N, 1, 5, 6), generator=generator, dtype=torch.float64)
    images[:, 0, 0, 0] += 0.25 * labels
    masks = torch.rand((N_ALIGN, 5, 6), generator=generator) < 0.4
    masks[:3] = False  # one of each class, which erased regions are filled from
    return Split(images, labels), Split(images[:N_ALIGN], labels[:N_ALIGN]), masks


ALIGNMENTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model, settings
    "convolutions": ("net", {"rrr_lambda": 0.5, "gamma": 0.01, "seeds": [3, 4]}),
    "clipped": ("net", {"rrr_lambda": 20.0, "max_gradient_norm": 0.3, "learning_rate_schedule": "linear"}),
    "frozen": ("net", {"rrr_lambda": 0.5, "batch_norm": "frozen", "penalty": "contrast"}),
    "stacked": ("mlp", {"rrr_lambda": 0.5, "gamma": 0.01, "max_gradient_norm": 0.5, "seeds": [3, 4]}),
    "counterexamples": (
        "net",
        {"correction": "both", "rrr_lambda": 0.5, "counterexamples": {"swapped": 5, "erased": 3, "pair_weight": 0.7}},
    ),
    "mlp by counterexamples": (
        "mlp",
        {"correction": "counterexamples", "rrr_lambda": 0.0, "counterexamples": {"swapped": 3, "erased": 4}},
    ),
}
TRAININGS = {"net": 0.01, "norm": 0.0}  # model -> weight decay


def everything(store: Path | None = None) -> dict[str, Any]:
    """Every alignment and training: curves (as lists of rows) and weights by name."""
    found: dict[str, Any] = {}
    training, alignment, masks = splits()
    for name, (model, options) in ALIGNMENTS.items():
        settings = {"seeds": [3], "learning_rate": 0.01, "epochs": 3, "alignment_batch": 5, "training_batch": 16}
        chosen = AlignSettings.model_validate({**settings, **options})
        resume = Resume(Store(store), name, [], torch.device("cpu")) if store else None
        runs = align_ensemble(network(model), training, alignment, masks, training, chosen, resume=resume)
        found[name] = [(run.curve.to_numpy().tolist(), run.weights) for run in runs]
    for name, decay in TRAININGS.items():
        model = network(name)
        curve = train_classifier(  # 41 samples in batches of 16: the last one has 9
            model, training, training, learning_rate=0.01, weight_decay=decay, batch_size=16, epochs=3, seed=2
        )
        found[f"training of {name}"] = [(curve.to_numpy().tolist(), model.state_dict())]
    return found


def refusals() -> dict[str, str]:
    """What is refused in several processes -> the message."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    training, _, _ = splits()
    said = {}

    def attempt(name: str, model: nn.Module, **options: Any) -> None:
        settings = {"learning_rate": 0.01, "batch_size": 16, "epochs": 1, "seed": 2}
        try:
            train_classifier(model, training, training, **{**settings, **options})
        except ValueError as error:
            said[name] = str(error)

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    attempt("sharded", fully_shard(network("mlp"), mesh=mesh))
    attempt("wrapped", DistributedDataParallel(network("mlp")))
    attempt("last batch", network("mlp"), batch_size=20)
    attempt("objective", network("mlp"), objective=lambda logits, labels, rows: logits.sum())
    return said


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    store = out / f"store of {number()}"
    results = {"found": everything(store), "resumed": everything(store), "refusals": refusals()}
    torch.save(results, out / f"{number()}.pt")
    distributed.destroy_process_group()
