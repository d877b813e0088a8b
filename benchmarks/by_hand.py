"""What a careful person would write without the service: one TorchTrainer, one tokenizer step.

Started by benchmarks/submit_to_first_step.py inside a running Ray cluster. Prints one line of JSON
with the times (seconds since the epoch) at which each part was done.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cim_core.config import TokenizerConfig, TrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import Index, scan
from cim_core.data.loading import ImageLoader
from cim_core.durations import plan
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.optim import build_optimizer
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task


def first_step(config: dict[str, Any]) -> dict[str, float]:
    """Build the model, do one step, and return when that was done."""
    entered = time.time()
    training = TrainingConfig(**config["training"])
    index = Index.from_json(config["index"])
    model_config = TokenizerConfig(**config["model"])
    model = DiscreteVAE(model_config, generator=generator_for(0, "init", "tokenizer"))
    views = ViewConfig(image_size=model_config.image_size, crop_min=training.crop_min)
    dataset = ImageDataset(index, views)
    batches = ImageLoader(dataset, batch_size=training.batch_size).steps(0, 1)
    built = time.time()
    train_step(
        tokenizer_task(model, seed=0),
        TrainState(model=model, optimizer=build_optimizer(model, training)),
        next(batches),
        plan=plan(training, num_images=len(dataset)),
        training=training,
        device=torch.device("cpu"),
    )
    return {"trainer start": entered, "model": built, "first step": time.time()}


def main() -> None:
    """Connect, read the images, train one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="the tokenizer spec as JSON")
    spec = json.loads(parser.parse_args().spec)
    index = scan(spec["data"]["uri"])
    times = {"process start and data scan": time.time()}
    ray.init(address="auto", log_to_driver=False)
    cpus = spec["resources"]["cpus_per_worker"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            first_step,
            train_loop_config={
                "index": index.to_json(),
                "model": spec["model"],
                "training": spec["training"],
            },
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": cpus}),
            run_config=RunConfig(name="by-hand", storage_path=folder),
        )
        times |= trainer.fit().return_value
    print(json.dumps(times))


if __name__ == "__main__":
    main()
