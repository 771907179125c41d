"""Files for others: loaded by their own libraries again, and a card that Hugging Face reads."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from lvlmva_core.errors import InputError
from lvlmva_core.export import Compared, card, compare_models, export_onnx, export_program
from lvlmva_core.models import ModelSpec, build_model, load_checkpoint, save_checkpoint


def _model(name: str) -> tuple[nn.Module, Tensor]:
    spec = ModelSpec(name, 1, 32, 32, 3, 4, head="appended" if name == "mlp" else "own")
    return build_model(spec, 0).eval(), torch.rand((5, 1, 32, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "efficientnet_lite0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_computes_the_same_for_any_number_of_pictures(name: str, tmp_path: Path) -> None:
    model, images = _model(name)
    found = export_program(model, images, tmp_path / "m.pt2")
    loaded = torch.export.load(str(tmp_path / "m.pt2")).module()
    for n in (1, 4):
        torch.testing.assert_close(loaded(images[:n]), model(images[:n]), atol=1e-4, rtol=1e-4)
    assert found.difference < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same_for_any_number_of_pictures(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = _model("small_resnet")
    export_onnx(model, images, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 4):
        (found,) = session.run(None, {"images": images[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images[:n]).detach(), atol=1e-4, rtol=1e-4)


def test_what_differs_is_refused(tmp_path: Path) -> None:
    model, images = _model("small_resnet")
    other = build_model(ModelSpec("small_resnet", 1, 32, 32, 3, 4), 1).eval()
    with pytest.raises(InputError, match="loaded again it differs from the model by"):
        compare_models(tmp_path / "m", model, other, images)
    save_checkpoint(tmp_path / "m", ModelSpec("small_resnet", 1, 32, 32, 3, 4), model)
    again, _ = load_checkpoint(tmp_path / "m", torch.device("cpu"))
    assert compare_models(tmp_path / "m", model, again, images).difference < 1e-6


class _Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * (2 if float(x.sum()) > 0 else 3)


def test_a_model_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.pt2: the model cannot be exported by torch\.export"):
        export_program(_Branches().eval(), torch.rand(3, 1, 4, 4), tmp_path / "m.pt2")


def test_the_card_is_read_by_hugging_face_and_hides_no_stand_in(tmp_path: Path) -> None:
    text = card(
        name="skin",
        dataset="skin",
        classes=["benign", "<script>alert(1)</script>"],
        shape=(3, 64, 64),
        spurious_feature="a bandage",
        base="resnet18, from checkpoint",
        critic="oracle (a stand-in, not a vision-language model)",
        warning="No vision-language model was asked.",
        rejected={"samples": 10, "masked": 4, "area": 0.05, "per_class": {"benign": 4, "malignant": 0}},
        table=[{"metric": "accuracy", "before": (0.7, 0.6, 0.8), "after": (0.75, 0.65, 0.85)}],
        files=[Compared(tmp_path / "model.onnx", 1e-6)],
    )
    (tmp_path / "README.md").write_text(text)
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.pipeline_tag == "image-classification"
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    assert "**No vision-language model was asked.**" in read.text
    assert "0.700 [0.600, 0.800]" in read.text
    assert "<script>" not in read.text
    assert "4 of 10 alignment samples" in read.text
