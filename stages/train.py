"""Stage train: the base model."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.hydrate import open_store
from lvlmva.params import load_params
from lvlmva.pipeline import code_files
from lvlmva_core.arrays import write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.models import ModelSpec, build_model, load_weights, save_checkpoint, weights_digest
from lvlmva_core.resume import Resume
from lvlmva_core.samples import read_class_names, read_samples
from lvlmva_core.splits import read_split
from lvlmva_core.training import train_classifier


def train(params: Path, images: Path, samples: Path, base: Path, train_metrics: Path, train_curve: Path) -> None:
    """Train the base model with cross-entropy."""
    loaded = load_params(params)
    config = loaded.train
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    training, validation = (read_split(images, table, split, device) for split in ("train", "val"))
    channels, height, width = training.images.shape[1:]
    spec = ModelSpec(config.model, channels, height, width, len(read_class_names(images)), config.hidden)
    model = build_model(spec, config.seed)
    if config.weights is not None:
        load_weights(model, spec, config.weights)
    model.to(device)
    tensors = (training.images, training.labels, validation.images, validation.labels)
    inputs = {
        "train": config.model_dump(),
        "compute": loaded.compute.model_dump(),
        "weights": weights_digest(model),
        "tensors": [tensor.cpu().numpy() for tensor in tensors],
    }
    resume = Resume(open_store(), inputs, code_files("stages.train"), device)
    history = train_classifier(
        model,
        training,
        validation,
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
