"""The trained enhancer as a folder that plain timm loads; nothing of this package is needed there."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from cim_core.cim import CIM
from cim_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cim_core.models.probe import build_on_meta
from cim_core.pretraining import Pretraining

# Facts of the model card beyond the configuration; a missing one is written as "not recorded".
CARD_KEYS = ("dataset", "images_used", "images_skipped", "steps", "epochs", "job", "code_version")
METHOD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "cim": "Corrupted Image Modeling (arXiv 2202.03382)",
        "beit": "BEiT (arXiv 2106.08254), as a peer of CIM",
        "simmim": "SimMIM (arXiv 2111.09886), as a peer of CIM",
        "mae": "Masked Autoencoder (arXiv 2111.06377), as a peer of CIM",
    }
)


def export_encoder(model: Pretraining, folder: str | Path, *, card: Mapping[str, Any]) -> Path:
    """Write model.safetensors, config.json and README.md (the model card) to `folder`; returns it.

    `card` may hold any of CARD_KEYS; further keys are added to the card as they are. Method, objective,
    tokenizer (a fake one is called FAKE) and configuration are taken from `model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = encoder_weights(model)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = encoder_config(model)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    text = model_card(model, config=config, num_parameters=_num_elements(weights), card=card)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def encoder_weights(model: Pretraining) -> dict[str, Tensor]:
    """The encoder's tensors under the names and shapes that timm's own model has, on the CPU.

    They are the enhancer's last ones, or their running average where there is one.
    """
    plan = model.enhancer.plan
    own = build_on_meta(plan.name, plan.export_args).state_dict()
    trained = model.encoder.state_dict()
    assert own.keys() == trained.keys(), (
        f"{plan.name} is exported with other tensors than it was trained with"
    )
    # Where training ran without pooling, timm's linear layers were 1x1 convolutions.
    return {key: trained[key].detach().reshape(own[key].shape).cpu().contiguous().clone() for key in own}


def encoder_config(model: Pretraining) -> dict[str, Any]:
    """What timm reads as config.json: architecture, arguments, and how images have to look."""
    plan = model.enhancer.plan
    size = [3, model.config.image_size, model.config.image_size]
    # timm would take a differing pool or class count of its registry as a wish to adapt the weights.
    model_args = {key: value for key, value in plan.export_args.items() if key != "num_classes"}
    return {
        "architecture": plan.name,
        "num_classes": 0,
        "num_features": plan.width,
        **({"global_pool": model_args["global_pool"]} if "global_pool" in model_args else {}),
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": model.config.method,
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": "img_size" in model_args,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": None,
            "classifier": None,
        },
    }


def model_card(
    model: Pretraining, *, config: Mapping[str, Any], num_parameters: int, card: Mapping[str, Any]
) -> str:
    """The README.md beside the weights."""
    settings = model.config
    facts = {
        "Architecture": f"`{config['architecture']}` of timm {timm.__version__}, {num_parameters:,} numbers",
        "Arguments": f"`{json.dumps(config['model_args'])}`",
        "Input": f"{settings.image_size} x {settings.image_size} pixels, ImageNet mean and deviation",
        "Method": METHOD_NAMES[settings.method],
        **_of_method(model),
        "Grid": f"{settings.grid} x {settings.grid}",
        "Weights": _which_weights(settings.enhancer.ema_decay),
        "PyTorch": torch.__version__,
        **{key.replace("_", " ").capitalize(): card.get(key, "not recorded") for key in CARD_KEYS},
        **{key.replace("_", " ").capitalize(): value for key, value in card.items() if key not in CARD_KEYS},
    }
    rows = "\n".join(f"| {key} | {str(value).replace('|', '/')} |" for key, value in facts.items())
    warning = _FAKE_WARNING if model.frozen is not None and model.frozen.is_fake else ""
    title = METHOD_NAMES[settings.method].partition(" (")[0]
    return _CARD.format(name=config["architecture"], method=title, rows=rows, warning=warning)


def _of_method(model: Pretraining) -> dict[str, str]:
    """Objective, tokenizer and decoder of the methods that have one."""
    settings, tokenizer = model.config, model.frozen
    facts = {}
    if isinstance(model, CIM):
        facts["Objective"] = f"`{model.objective_name}`, weight {model.weight:g}"
    if settings.tokenizer is not None and tokenizer is not None:
        source = settings.tokenizer.source + (" (FAKE)" if tokenizer.is_fake else "")
        facts["Tokenizer"] = f"{source}, {tokenizer.vocab_size} tokens, {tokenizer.stride} pixels each"
    if settings.decoder is not None:
        decoder = settings.decoder
        facts["Decoder"] = f"{decoder.depth} blocks, {decoder.width} wide, {decoder.heads} heads; thrown away"
    return facts


def _which_weights(ema_decay: float | None) -> str:
    return "of the last step" if ema_decay is None else f"running average over the steps, decay {ema_decay:g}"


def _num_elements(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())


_FAKE_WARNING = """
> **FAKE TOKENIZER.** This encoder was trained with an untrained stand-in that exists for tests. Its
> weights are worth nothing beyond a test.
"""

_CARD = """# {name}, pre-trained by {method}
{warning}
| | |
| --- | --- |
{rows}

## Loading

```python
import timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)
```

`pretrained=True` is needed: without it timm builds the same architecture with RANDOM weights and says
nothing. The keys are loaded strictly. The model has no classifier; `num_classes=N` adds an untrained one.

```python
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
features = model(transform(image).unsqueeze(0))     # pooled, as this architecture pools
feature_map = model.forward_features(transform(image).unsqueeze(0))
```

Layers that only the pre-training needed (generator, heads, decoder, tokenizer) are not here.
"""
