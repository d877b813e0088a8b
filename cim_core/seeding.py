"""One function behind every random choice, so that no generator state is ever saved.

A choice is a pure function of the job's seed, the name of its stream and the counters that place
it: `generator_for(seed, "mask", step, rank, micro)`. A run that resumes at step s therefore draws
what the uncut run drew there, and no two streams depend on how often the other was used.

Streams in use:
    "order", epoch                  order of the images in one epoch
    "augment", epoch, index         crop and flip of one image in one epoch
    "step", step, rank, micro       everything inside one forward pass that torch draws by itself
    "cim", step, rank, micro        masks and samples of one forward pass of a CIM model
    "init", name                    weights before step one
    "pictures", ...                 images of sample pictures, their masks and samples
    "diagnostics", "masks"          masks and samples of a look at the running model
    "loader"                        base seed of the loader's processes (decides nothing we use)
"""

import hashlib
import json

import torch


def seed_for(seed: int, *stream: int | str) -> int:
    """A 63-bit seed for this stream: the start of a SHA-256 over the seed, the name and the counters."""
    if not stream:
        raise ValueError("a stream needs a name: two unnamed streams would draw the same numbers")
    key = json.dumps([seed, *stream], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generator_for(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator that stands at the start of this stream.

    Torch's CPU generator takes only 32 bits of its seed, so two of a million streams may coincide;
    that gives two images the same crop numbers, which harms nothing.
    """
    return torch.Generator(device=device).manual_seed(seed_for(seed, *stream))
