"""Pictures that contradict a shortcut, made of rejected regions: counterexample alignment, an extension of LVLM-VA.

Where the paper's correction flattens the model's gradient inside a rejected region, this one shows the model that the
region's content says nothing:

- swap: a donor's rejected region, laid over a picture of another class at the same place, which keeps its own label;
- erase: a donor's rejected region, filled from the same place of a picture of its class in which nothing was rejected,
  or from what lies around it, by blur or inpainting;
- pair: the squared change of the logits' contrasts between a picture and its swapped twin.

Counterexamples from explanations are CAIPI's (Teso and Kersting 2019), an object added to and taken from pictures so
that it no longer goes with a class is SPIRE's (Plumb et al. 2022), altering what does not decide the label is Chang et
al.'s (2021), and pairing is logit pairing (Kannan et al. 2018).
What is ours is that the place comes from a critic's verdict, and that no label of the shortcut is needed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lvlmva_core.data_parallel import share
from lvlmva_core.errors import InputError
from lvlmva_core.fills import Membrane, fill_by_blur, fill_smoothly
from lvlmva_core.samples import Split

if TYPE_CHECKING:
    from lvlmva_core.align_settings import CounterexampleSettings


@dataclass(frozen=True)
class Made:
    """The counterexamples of a step.

    swapped: (s, C, H, W), twins: (s, C, H, W), the same pictures without the donor's region, swapped_labels: (s,), of
    both. erased: (e, C, H, W), erased_labels: (e,), the donors' own.
    """

    swapped: Tensor
    twins: Tensor
    swapped_labels: Tensor
    erased: Tensor
    erased_labels: Tensor


class Counterexamples:
    """What counterexamples of one run are made of, and how they are drawn.

    Donors are alignment samples with a rejected region. Receivers of a swap are training samples of another class.
    Fillers of an erasure are alignment samples of the donor's class in which nothing was rejected; where the class has
    none, those in which nothing was rejected at the donor's place. With another `fill` a donor is its own filler.

    Args:
        training: N samples. alignment: n samples. masks: bool (n, H, W), True where a region was rejected; of weights
            in [0, 1], as votes give them, what is above 0.5, which is the verdict.

    Raises:
        InputError: swaps are asked for and no rejected region has a picture of another class to go to, or erasures and
            no rejected region can be filled.
    """

    def __init__(self, training: Split, alignment: Split, masks: Tensor, settings: "CounterexampleSettings") -> None:
        self.training, self.alignment, self.settings = training, alignment, settings
        masks = masks > 0.5
        self._masks = masks.cpu().numpy()
        self._membranes: dict[int, Membrane] = {}  # of donors, made when first needed
        self.opacity = opacity_of(masks, settings.feather).to(alignment.images)[:, None]
        order = _order_of_content(alignment, masks)
        labels, receivers = alignment.labels.cpu().numpy(), training.labels.cpu().numpy()
        rejected = masks.flatten(1).cpu().numpy()
        donors = [place for place in order if rejected[place].any()]
        self._receivers = {int(k): np.flatnonzero(receivers == k) for k in np.unique(receivers)}
        self._fillings = alignment.images
        self._fillers = {donor: np.array([donor]) for donor in donors}
        if settings.fill == "same_class":
            self._fillers = {donor: _fillers_of(donor, order, labels, rejected) for donor in donors}
        elif settings.erased:
            self._fillings = _filled(alignment.images, self._masks, donors, settings.fill)
        self._swapped = _by_class([d for d in donors if self._receivers.keys() - {int(labels[d])}], labels)
        self._erased = _by_class([d for d in donors if len(self._fillers[d])], labels)
        if settings.swapped and not self._swapped:
            raise InputError(
                "counterexamples.swapped: no rejected region has a training picture of another class to be laid over; "
                "look at the verdicts"
            )
        if settings.erased and not self._erased:
            raise InputError(
                "counterexamples.erased: no rejected region can be filled from a picture of its class with nothing "
                "rejected there; set it to 0"
            )

    def donors_per_class(self) -> dict[str, dict[int, int]]:
        """How many donors each class has: "swapped" and "erased" -> class -> count."""
        kinds = {"swapped": self._swapped, "erased": self._erased}
        return {name: {label: len(places) for label, places in found.items()} for name, found in kinds.items()}

    def draw(self, steps: int, seed: int, epoch: int) -> Tensor:
        """The pairs of an epoch: int64 (steps, swapped + erased, 2), of each a donor's place in the alignment set and
        a receiver's in the training split (swapped, which come first), or a filler's in the alignment set.

        Classes of donors take turns, so that each gives as many as the others, to one, in every run of steps; within a
        class all donors do. Receivers are drawn from the other classes alike. The draws depend on seed, epoch and what
        the pictures show, never on the order of the alignment set.
        """
        rng = np.random.default_rng([seed, epoch, 17])
        drawn = []
        for places, count, others in (
            (self._swapped, self.settings.swapped, self._draw_receivers),
            (self._erased, self.settings.erased, self._draw_fillers),
        ):
            pairs = np.zeros((steps * count, 2), dtype=np.int64)
            if count:
                turn = np.arange(len(pairs)) % len(places)
                for number, label in enumerate(places):
                    slots = np.flatnonzero(turn == number)
                    pairs[slots, 0] = _dealt(places[label], len(slots), rng)
                    pairs[slots, 1] = others(label, pairs[slots, 0], rng)
            drawn.append(pairs.reshape(steps, count, 2))
        return torch.from_numpy(np.concatenate(drawn, axis=1))

    def make(self, drawn: Tensor) -> Made:
        """The pictures of a step: `drawn` (swapped + erased, 2) as `draw` gives them, on the pictures' device. Of
        several processes each makes its share of both kinds."""
        swapped, erased = (share(kind) for kind in drawn.split([self.settings.swapped, self.settings.erased]))
        donors, others = torch.cat([swapped, erased]).unbind(1)
        n = len(swapped)
        own, opacity = self.alignment.images[donors], self.opacity[donors]
        twins, fillers = self.training.images[others[:n]], self._fillings[others[n:]]
        return Made(
            swapped=self._laid(twins, own[:n], donors[:n], opacity[:n]),
            twins=twins,
            swapped_labels=self.training.labels[others[:n]],
            erased=self._laid(own[n:], fillers, donors[n:], opacity[n:]),
            erased_labels=self.alignment.labels[donors[n:]],
        )

    def _laid(self, below: Tensor, above: Tensor, donors: Tensor, opacity: Tensor) -> Tensor:
        """Donors' regions of `above` laid over `below`, with the edges that are set."""
        if self.settings.edges != "blended":
            return lay_over(below, above, opacity)
        result = below.clone()
        for place, donor in enumerate(donors.tolist()):
            mask = torch.from_numpy(self._masks[donor]).to(below.device)
            if donor not in self._membranes:
                self._membranes[donor] = Membrane(self._masks[donor])
            shift = self._membranes[donor]((below[place] - above[place]).double().cpu().numpy())
            result[place][:, mask] = (above[place][:, mask] + torch.from_numpy(shift).to(below)).clamp(0, 1)
        return result

    def _draw_receivers(self, label: int, donors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        others = [k for k in self._receivers if k != label]
        found = np.zeros(len(donors), dtype=np.int64)
        turn = rng.permutation(np.arange(len(donors)) % len(others))
        for number, other in enumerate(others):
            slots = np.flatnonzero(turn == number)
            found[slots] = rng.choice(self._receivers[other], len(slots))
        return found

    def _draw_fillers(self, _label: int, donors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.array([rng.choice(self._fillers[donor]) for donor in donors.tolist()], dtype=np.int64)


def lay_over(below: Tensor, above: Tensor, opacity: Tensor) -> Tensor:
    """Pictures (B, C, H, W) with others laid over them: opacity (B, 1, H, W), 0..1; exact where it is 0 or 1.

    Examples:
        >>> lay_over(torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 1, 3), torch.tensor([[[[0.0, 0.25, 1.0]]]]))
        tensor([[[[0.0000, 0.2500, 1.0000]]]])
    """
    return opacity * above + (1 - opacity) * below


def opacity_of(masks: Tensor, feather: float | None = None) -> Tensor:
    """How much of each pixel is taken from the donor: float64 (n, H, W), 1 inside the mask.

    Args:
        masks: bool (n, H, W). feather: pixels over which the opacity falls from 1 at the mask to 0, linearly in the
            distance to the mask; None = a hard edge, 0 everywhere outside.
    """
    from scipy.ndimage import distance_transform_edt

    hard = masks.double()
    if feather is None:
        return hard
    away = [
        distance_transform_edt(mask == 0) if mask.any() else np.full(mask.shape, np.inf) for mask in hard.cpu().numpy()
    ]
    fallen = 1 - torch.from_numpy(np.stack(away)).to(hard) / feather
    return torch.maximum(hard, fallen.clamp(0, 1))


def pair_change(logits: Tensor, twins: Tensor) -> Tensor:
    """Squared change of the logits' contrasts between pictures and their twins: (B, K), (B, K) -> (B,).

    The contrast of a class is its logit less the mean of the others'; the mean over classes of the squares is taken.
    With two classes it is the squared change of z_1 - z_0. What moves all logits alike is no change.

    Examples:
        >>> pair_change(torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 4.0]]))
        tensor([4.])
    """
    classes = logits.shape[1]
    change = logits - twins
    contrasts = (change - change.mean(1, keepdim=True)) * classes / (classes - 1)
    return contrasts.square().mean(1)


def _filled(images: Tensor, masks: np.ndarray, donors: Sequence[int], fill: str) -> Tensor:
    """The pictures, those of donors with their region filled from what lies around it."""
    filled, by = images.clone(), fill_by_blur if fill == "blur" else fill_smoothly
    for donor in donors:
        filled[donor] = torch.from_numpy(by(images[donor].cpu().numpy(), masks[donor])).to(images)
    return filled


def _by_class(places: Sequence[int], labels: np.ndarray) -> dict[int, np.ndarray]:
    """Places by their class, classes rising, places in the order given."""
    found: dict[int, list[int]] = {int(k): [] for k in np.unique(labels[list(places)])}
    for place in places:
        found[int(labels[place])].append(place)
    return {label: np.array(those) for label, those in found.items()}


def _fillers_of(donor: int, order: Sequence[int], labels: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    own = [place for place in order if labels[place] == labels[donor] and place != donor]
    unmasked = [place for place in own if not rejected[place].any()]
    free = unmasked or [place for place in own if not (rejected[place] & rejected[donor]).any()]
    return np.array(free, dtype=np.int64)


def _dealt(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the places, each as often as the others, to one."""
    passes = [rng.permutation(places) for _ in range(-(-count // len(places)))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *passes])[:count]


def _order_of_content(alignment: Split, masks: Tensor) -> list[int]:
    """Places in the order of a digest of what is there, so that no draw depends on how the samples were sorted."""
    parts = (alignment.images.cpu().numpy(), masks.cpu().numpy(), alignment.labels.cpu().numpy())
    digests = [
        hashlib.sha256(b"".join(np.ascontiguousarray(part[place]).tobytes() for part in parts)).digest()
        for place in range(len(parts[0]))
    ]
    return sorted(range(len(digests)), key=digests.__getitem__)
