"""Load an encoder folder with plain timm, in a process that cannot import this project.

Run as a script with the folder and the image size; prints one JSON line about the features.
"""

import importlib.abc
import json
import sys


class _NotOurs(importlib.abc.MetaPathFinder):
    """Refuses the packages of this project."""

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname.split(".")[0] in {"cim_core", "service", "workers"}:
            raise ImportError(f"{fullname} is blocked here")


def main(folder: str, image_size: int) -> None:
    """Print shape, finiteness and spread of the features of two random pictures."""
    sys.meta_path.insert(0, _NotOurs())
    try:
        __import__("cim_core")
    except ImportError:
        pass
    else:
        raise AssertionError("this process can import the project")
    timm = __import__("timm")
    torch = __import__("torch")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = model(images)
    print(  # noqa: T201
        json.dumps(
            {
                "shape": list(features.shape),
                "finite": bool(features.isfinite().all()),
                "spread": float(features.std()),
                "parameters": sum(p.numel() for p in model.parameters()),
                "checksum": float(sum(p.double().abs().sum() for p in model.parameters())),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
