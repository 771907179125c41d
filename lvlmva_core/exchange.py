"""What a prediction depends on, without a label for the shortcut: regions exchanged for those of other pictures.

An extension of LVLM-VA. A region that the model uses changes the prediction when it comes from another class's picture;
one that it does not use changes nothing, whatever an attribution says of it. Filled from pictures of its own class, a
region that the model uses for what it should changes little either.

Throughout, the logit of the true class is centred: the mean over the classes is subtracted, which changes no
probability and takes away what all logits share. With two classes it is half their difference.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lvlmva_core.errors import InputError
from lvlmva_core.independence import independent_regions, typical_size
from lvlmva_core.models import predict_logits
from lvlmva_core.progress import track
from lvlmva_core.samples import Split


@dataclass(frozen=True)
class Reliance:
    """How the true class's centred logit falls when a region is exchanged; N samples, J regions.

    other, own: float32 (N, J), mean over donors of other classes and of the own class; positive = the region's content
        spoke for the class. NaN where the region owns no pixel.
    other_spread, own_spread: float32 (N, J), standard deviation over donors (n - 1; 0 for one donor).
    flipped: float32 (N, J), share of the donors of other classes with which the predicted class becomes another.
    logit: float32 (N,), the centred logit of the true class before.
    """

    other: np.ndarray
    other_spread: np.ndarray
    own: np.ndarray
    own_spread: np.ndarray
    flipped: np.ndarray
    logit: np.ndarray


def centred(logits: Tensor, labels: Tensor) -> Tensor:
    """The true class's logit minus the mean over classes: (n, K), (n,) -> (n,)."""
    return (logits - logits.mean(1, keepdim=True)).gather(1, labels[:, None])[:, 0]


def exchange_regions(
    model: nn.Module,
    samples: Split,
    ids: Sequence[str],
    segments: np.ndarray,
    donors: Split,
    donor_ids: Sequence[str],
    *,
    n_regions: int,
    n_donors: int,
    batch_size: int,
    seed: int,
) -> Reliance:
    """Exchange each region of each sample for the same place of other pictures, and see what the logit does.

    Every region of a sample meets the same donors, `n_donors` of other classes and `n_donors` of its own, which depend
    on the seed and the sample's id alone, never on the other samples.

    Args:
        model: in eval mode. samples: images (N, C, H, W), labels (N,). ids: of them.
        segments: uint8 (N, H, W), 255 = none.
        donors: pictures to fill from, on the same device. donor_ids: of them; a sample never fills itself.

    Raises:
        InputError: a class has no donor, of its own or of another class.
    """
    labels = samples.labels
    donor_labels, names = donors.labels.cpu().numpy(), np.asarray(donor_ids, dtype=str)
    shape = (len(ids), n_regions)
    found = {name: np.full(shape, np.nan, dtype=np.float32) for name in ("other", "own")}
    spread = {name: np.full(shape, np.nan, dtype=np.float32) for name in ("other", "own")}
    flipped = np.full(shape, np.nan, dtype=np.float32)
    before = predict_logits(model, samples.images, batch_size)
    logit, predicted = centred(before, labels.to(before.device)), before.argmax(1)
    for n, sample in enumerate(track(ids, "exchange")):
        present = [region for region in range(n_regions) if (segments[n] == region).any()]
        if not present:
            continue
        label, rng = int(labels[n]), np.random.default_rng([seed, zlib.crc32(sample.encode())])
        masks = torch.from_numpy(np.stack([segments[n] == region for region in present])).to(samples.images.device)
        drawn = {}
        for name in ("other", "own"):
            same = (donor_labels == label) & (names != sample)
            pool = np.flatnonzero(same if name == "own" else donor_labels != label)
            if not len(pool):
                raise InputError(
                    f"sample '{sample}': no picture of {'its own' if name == 'own' else 'another'} class to exchange "
                    "its regions with; give the training split one"
                )
            drawn[name] = rng.choice(pool, min(n_donors, len(pool)), replace=False)
        # both kinds in one pass: small batches waste a processor
        filling = donors.images[np.concatenate(list(drawn.values()))]
        filled = torch.where(masks[:, None, None], filling, samples.images[n])
        logits = predict_logits(model, filled.flatten(0, 1), batch_size)
        after = centred(logits, torch.full((len(logits),), label, device=logits.device))
        falls = (logit[n] - after).double().reshape(len(present), -1).cpu().numpy()
        n_other = len(drawn["other"])
        for name, fall in (("other", falls[:, :n_other]), ("own", falls[:, n_other:])):
            found[name][n, present] = fall.mean(1)
            spread[name][n, present] = fall.std(1, ddof=1) if fall.shape[1] > 1 else 0.0
        turned = (logits.argmax(1) != predicted[n]).double().reshape(len(present), -1)[:, :n_other]
        flipped[n, present] = turned.mean(1).cpu().numpy()
    return Reliance(found["other"], spread["other"], found["own"], spread["own"], flipped, logit.float().cpu().numpy())


def summary_of(found: Reliance) -> dict[str, float | int]:
    """Numbers for the metrics file: how much hangs on the region that each sample hangs on most."""
    scale = typical_size(found.logit) or 1.0
    with_region = ~np.isnan(found.other).all(axis=1)
    most = np.nanmax(found.other[with_region], axis=1)
    return {
        "samples": int(with_region.sum()),
        "regions": int((~np.isnan(found.other)).sum()),
        "mean_of_largest_fall": float(most.mean()) / scale,
        "mean_fall": float(np.nanmean(found.other)) / scale,
        "mean_fall_own_class": float(np.nanmean(found.own)) / scale,
        "share_of_regions_within_0.1": float(
            independent_regions(
                (found.other, found.own), (found.other_spread, found.own_spread), found.logit, 0.1
            ).sum()
            / (~np.isnan(found.other)).sum()
        ),
    }


@dataclass(frozen=True)
class Trial:
    """Held-out pictures with rejected content put into them: what one model is then asked, and every other model alike.

    rows: int64 (n,), places of the pictures. donors: int64 (n, d), places of alignment samples whose rejected region is
    put in. fills: int64 (n, d), places of the held-out pictures of the own class that fill the same place instead.
    """

    rows: np.ndarray
    donors: np.ndarray
    fills: np.ndarray


def draw_trial(
    labels: np.ndarray, masks: np.ndarray, donor_labels: np.ndarray, *, n_held_out: int, n_donors: int, seed: int
) -> Trial | None:
    """Draw which rejected regions are put into which held-out pictures; None where nothing was rejected.

    A picture gets rejected regions of samples of other classes; pictures of a class for which there are none are left
    out. Drawn with replacement where there are fewer than `n_donors`, so that each picture counts alike.

    Args:
        labels: (M,), of the held-out pictures. masks: bool (N, H, W), rejected regions of the alignment samples.
        donor_labels: (N,).
    """
    rng = np.random.default_rng([seed, 7])
    rejected = np.flatnonzero(masks.any(axis=(1, 2)))
    order = rng.permutation(len(labels))
    rows: list[int] = []
    donors: list[np.ndarray] = []
    fills: list[np.ndarray] = []
    for row in order:
        pool = rejected[donor_labels[rejected] != labels[row]]
        own = np.flatnonzero(labels == labels[row])
        own = own[own != row]
        if len(rows) < n_held_out and len(pool) and len(own):
            rows.append(int(row))
            donors.append(rng.choice(pool, n_donors, replace=len(pool) < n_donors))
            fills.append(rng.choice(own, n_donors, replace=len(own) < n_donors))
    if not rows:
        return None
    places = np.argsort(rows)
    return Trial(np.asarray(rows)[places], np.stack(donors)[places], np.stack(fills)[places])


def run_trial(
    model: nn.Module, held_out: Split, donor_images: Tensor, masks: Tensor, trial: Trial, batch_size: int
) -> np.ndarray:
    """Centred logits of the true class, float32 (n, 3): of the picture, with rejected content in it, and filled with
    its own class's content at the same place instead; the last two are means over donors.

    Args:
        model: in eval mode. donor_images: (N, C, H, W), alignment samples. masks: bool (N, H, W), on the same device.
    """
    labels = held_out.labels[trial.rows]
    pictures = held_out.images[trial.rows]
    columns = [centred(predict_logits(model, pictures, batch_size), labels)]
    for source, drawn in ((donor_images, trial.donors), (held_out.images, trial.fills)):
        sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        for place in range(drawn.shape[1]):
            where = masks[trial.donors[:, place]][:, None]
            changed = torch.where(where, source[drawn[:, place]], pictures)
            sums += centred(predict_logits(model, changed, batch_size), labels).double()
        columns.append((sums / drawn.shape[1]).float())
    return torch.stack(columns, 1).cpu().numpy()
