import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cim_core.cim import CIM
from cim_core.config import ModelConfig
from cim_core.export import export_encoder
from cim_core.tokenizers.fake import FakeTokenizer
from tests.unit.cim_core.cim_models import model_config, tiny_cim

MODELS = {
    "vit at an odd size with few blocks": model_config(image_size=65, patch_size=13),
    "resnet": model_config(name="test_resnet"),
    "convnext, whose norm sits in the head": model_config(name="test_convnext"),
    "vit with pooling by mean": model_config(
        name="vit_relpos_small_patch16_224", image_size=40, options={"depth": 1}, shared_blocks=0
    ),
    "vit with pooling of the user's choice": model_config(
        name="vit_tiny_patch16_224", options={"depth": 1, "global_pool": "avg"}, shared_blocks=0
    ),
    "maxvit, whose head is a convolution in training": model_config(name="test_maxvit", image_size=128),
}

ELSEWHERE = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"cim_core", "service", "workers"}:
            raise ImportError(f"{name} must not be needed")


sys.meta_path.insert(0, Blocker())
try:
    import cim_core
except ImportError:
    pass
else:
    raise SystemExit("the blocker does not block")
import timm
import torch
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
images = load_file(f"{folder}/../images.safetensors")["images"]
with torch.no_grad():
    save_file({"features": model.forward_features(images).contiguous()}, f"{folder}/../features.safetensors")
"""


def trained(config: ModelConfig) -> CIM:
    """A model whose every tensor differs from what timm would start with."""
    cim = tiny_cim(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in cim.enhancer.backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return cim.eval()


def images_for(config: ModelConfig) -> torch.Tensor:
    shape = (2, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_export__plain_timm_gives_the_trained_features(config: ModelConfig, tmp_path: Path) -> None:
    cim, images = trained(config), images_for(config)
    folder = export_encoder(cim, tmp_path / "encoder", card={})
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = cim.enhancer.backbone.forward_features(images)  # type: ignore[operator]
        assert torch.equal(model.forward_features(images), expected)
        assert model(images).shape == (2, model.num_features if not hasattr(model, "head_hidden_size")
                                       else model.head_hidden_size)  # fmt: skip
    assert model.num_classes == 0
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "config", [MODELS["vit at an odd size with few blocks"], MODELS["resnet"]], ids=["vit", "cnn"]
)
def test_export__loads_where_this_package_cannot_be_imported(config: ModelConfig, tmp_path: Path) -> None:
    cim, images = trained(config), images_for(config)
    folder = export_encoder(cim, tmp_path / "encoder", card={})
    save_file({"images": images}, tmp_path / "images.safetensors")
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE, encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", str(script), str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = cim.enhancer.backbone.forward_features(images)  # type: ignore[operator]
    assert torch.equal(load_file(tmp_path / "features.safetensors")["features"], expected)


def test_export__keys_are_loaded_strictly(tmp_path: Path) -> None:
    folder = export_encoder(trained(MODELS["resnet"]), tmp_path, card={})
    weights = load_file(folder / "model.safetensors")
    del weights["layer4.0.conv1.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_export__without_pretrained_timm_gives_random_weights_as_the_card_says(tmp_path: Path) -> None:
    cim = trained(MODELS["resnet"])
    folder = export_encoder(cim, tmp_path, card={})
    weights = timm.create_model(f"local-dir:{folder}").state_dict()
    assert weights.keys() == cim.enhancer.backbone.state_dict().keys()
    assert not any(
        torch.equal(weights[key], value)
        for key, value in cim.enhancer.backbone.state_dict().items()
        if value.is_floating_point()
    )
    assert "without it timm builds the same architecture with RANDOM weights" in card_of(folder)


def test_export__tells_timm_how_images_have_to_look(tmp_path: Path) -> None:
    config = MODELS["vit at an odd size with few blocks"]
    folder = export_encoder(trained(config), tmp_path, card={})
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 65, 65)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["model_args"] == {
        "img_size": 65,
        "patch_size": 13,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
    }


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_card__names_data_objective_and_tokenizer(tmp_path: Path) -> None:
    class RealTokenizer(FakeTokenizer):
        is_fake = False

    cim = tiny_cim(model_config(objective="revdet"), tokenizer=RealTokenizer(vocab_size=16, stride=4))
    text = card_of(
        export_encoder(cim, tmp_path, card={"images_used": 1234, "images_skipped": 5, "labels": "a|b"})
    )
    assert "| Images used | 1234 |" in text
    assert "| Images skipped | 5 |" in text
    assert "| Steps | not recorded |" in text
    assert "| Labels | a/b |" in text
    assert "`revdet`, weight 1 |" in text
    assert "16 tokens, 4 pixels each" in text
    assert "FAKE" not in text


def test_card__shouts_where_the_tokenizer_was_fake(tmp_path: Path) -> None:
    text = card_of(export_encoder(tiny_cim(), tmp_path, card={}))
    assert "fake (FAKE)" in text
    assert "worth nothing beyond a test" in text
