"""Our maps of a transformer block beside tangermeme's, which has rules for attention that is written with its modules.

pip install tangermeme
python -m benchmarks.attribution_tangermeme
"""

import math
import sys
import warnings

import torch
from tangermeme.deep_lift_shap import BilinearOp
from tangermeme.deep_lift_shap import deep_lift_shap as theirs
from torch import Tensor, nn

from lvlmva_core.attribution import deep_lift_shap


class Block(nn.Module):
    """Pre-norm attention of one head over a sequence of 4 channels, and a gated layer; every step is a module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale / math.sqrt(8)
        self.embed, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.RMSNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scores, self.mix, self.gate = BilinearOp(), BilinearOp(), BilinearOp("...,...->...")
        self.softmax, self.curve = nn.Softmax(-1), nn.GELU()
        self.up, self.side, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, length) to (n, 3)."""
        tokens = self.embed(x.transpose(1, 2))
        seen = self.norm(tokens)
        weights = self.softmax(self.scores(self.query(seen), self.key(seen).transpose(1, 2)) * self.scale)
        tokens = tokens + self.mix(weights, self.value(seen))
        tokens = tokens + self.gate(self.curve(self.up(tokens)), self.side(tokens))
        return self.head(self.last(tokens).mean(1))  # type: ignore[no-any-return]


def one_hot(count: int, length: int, seed: int) -> Tensor:
    """Random sequences, (count, 4, length)."""
    letters = torch.randint(4, (count, length), generator=torch.Generator().manual_seed(seed))
    return nn.functional.one_hot(letters, 4).transpose(1, 2)


def main() -> None:
    """Both on the same block, in both dtypes, with mild and with sharp attention."""
    warnings.simplefilter("ignore")  # tangermeme warns of its deltas, which are printed here
    for scale in (1.0, 30.0):
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(0)
            model = Block(scale).to(dtype).eval()
            x, b = one_hot(4, 12, 1).to(dtype), one_hot(8, 12, 2).to(dtype)
            both = torch.cat([each[None].expand(4, *each.shape) for each in (b,)])
            multipliers = theirs(model, x, target=1, references=both, raw_outputs=True, device="cpu")
            maps = (multipliers * (x[:, None] - both)).mean(1)
            mine = deep_lift_shap(model, x, b, 1)
            with torch.no_grad():
                change = (model(x)[:, 1] - model(b)[:, 1].mean()).double()
            gaps = [
                float(((each.double().sum((1, 2)) - change).abs() / each.double().abs().sum((1, 2))).max())
                for each in (maps, mine)
            ]
            apart = float((maps - mine).abs().max() / mine.abs().max())
            sys.stdout.write(
                f"scale {scale:g}, {dtype}: error of tangermeme {gaps[0]:.1e}, ours {gaps[1]:.1e}, apart {apart:.1e}\n"
            )


if __name__ == "__main__":
    main()
