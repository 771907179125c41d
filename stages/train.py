"""Stage train: the base model."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.hydrate import open_store
from lvlmva.params import load_params
from lvlmva_core import models, training
from lvlmva_core.arrays import write_json
from lvlmva_core.models import ModelSpec, build_model, load_weights, save_checkpoint, weights_digest
from lvlmva_core.resume import Resume
from lvlmva_core.samples import read_class_names, read_samples
from lvlmva_core.training import set_up_compute, train_classifier
from stages.data import split_tensors


def train(params: Path, images: Path, samples: Path, base: Path, train_metrics: Path, train_curve: Path) -> None:
    """Train the base model with cross-entropy."""
    loaded = load_params(params)
    config = loaded.train
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    pixels, labels, _ = split_tensors(images, table, "train", device)
    val_pixels, val_labels, _ = split_tensors(images, table, "val", device)
    channels, height, width = pixels.shape[1:]
    spec = ModelSpec(config.model, channels, height, width, len(read_class_names(images)), config.hidden)
    model = build_model(spec, config.seed)
    if config.weights is not None:
        load_weights(model, spec, config.weights)
    model.to(device)
    inputs = {
        "train": config.model_dump(),
        "compute": loaded.compute.model_dump(),
        "weights": weights_digest(model),
        "tensors": [tensor.cpu().numpy() for tensor in (pixels, labels, val_pixels, val_labels)],
    }
    resume = Resume(open_store(), inputs, [models, training], device)
    history = train_classifier(
        model,
        pixels,
        labels,
        val_pixels,
        val_labels,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        checkpoint=resume.part("base"),
    )
    save_checkpoint(base, spec, model)
    train_curve.parent.mkdir(parents=True, exist_ok=True)
    history.to_csv(train_curve, index=False)
    write_json(train_metrics, {"train": history.iloc[-1].drop("epoch").to_dict()})
    resume.clear()


if __name__ == "__main__":
    run(train)
