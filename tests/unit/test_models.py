from pathlib import Path

import pytest
import torch

from lvlmva_core.errors import InputError
from lvlmva_core.models import ModelSpec, build_model, load_checkpoint, predict_logits, save_checkpoint, weights_digest
from lvlmva_core.training import accuracy, set_up_compute, train_classifier

SPEC = ModelSpec("mlp", 1, 6, 5, n_classes=3, hidden=7)
CPU = torch.device("cpu")


def test_the_mlp_is_one_hidden_relu_layer() -> None:
    model = build_model(SPEC, seed=0)
    images = torch.rand(4, 1, 6, 5)
    weights = model.state_dict()
    hidden = (images.reshape(4, 30) @ weights["hidden.weight"].T + weights["hidden.bias"]).clamp(min=0)
    torch.testing.assert_close(model(images), hidden @ weights["output.weight"].T + weights["output.bias"])


def test_initial_weights_come_from_the_seed_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digests = [weights_digest(build_model(SPEC, seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_brings_the_same_model_back_in_the_same_bytes(tmp_path: Path) -> None:
    model = build_model(SPEC, seed=3)
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, SPEC, model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, spec = load_checkpoint(tmp_path / "a", CPU)
    assert spec == SPEC
    assert not loaded.training
    images = torch.rand(4, 1, 6, 5)
    assert torch.equal(predict_logits(loaded, images), predict_logits(model, images))
    torch.testing.assert_close(predict_logits(loaded, images, batch_size=3), predict_logits(model, images))


def test_a_bad_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(file, CPU)
    save_checkpoint(file, SPEC, build_model(SPEC, 0))
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(file, CPU)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, str(file))
    with pytest.raises(InputError, match="not a checkpoint of format 1"):
        load_checkpoint(file, CPU)
    model = build_model(SPEC, 0)
    with torch.no_grad():
        model.output.bias[0] = float("nan")  # type: ignore[union-attr, operator, index]
    save_checkpoint(file, SPEC, model)
    with pytest.raises(InputError, match="weights that are not finite"):
        load_checkpoint(file, CPU)


def test_unknown_names_and_devices_are_refused() -> None:
    with pytest.raises(InputError, match="no model 'vit'; known: mlp"):
        build_model(ModelSpec("vit", 1, 6, 5, 3, 7), 0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device for 'cuda'"):
            set_up_compute("cuda", 1)


def test_training_learns_what_can_be_learned_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = torch.rand((90, 1, 6, 5), generator=generator)
    images[torch.arange(90), 0, labels, 0] += 1
    digests = []
    for _ in range(2):
        model = build_model(SPEC, 0)
        curve = train_classifier(
            model, images, labels, images, labels, learning_rate=0.01, batch_size=16, epochs=15, seed=0
        )
        digests.append(weights_digest(model))
    assert digests[0] == digests[1]
    assert curve["epoch"].tolist() == list(range(1, 16))
    assert curve["loss"].iloc[-1] < 0.3 * curve["loss"].iloc[0]
    assert accuracy(model, images, labels) == curve["val_accuracy"].iloc[-1] > 0.9
