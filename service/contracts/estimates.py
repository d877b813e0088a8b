"""What a job will take: counted on the networks themselves, before anything is stored or run.

`Question` and `Cost` are the two sides of `python -m workers.estimate`.
"""

from pydantic import Field

from cim_core.config import ModelConfig, TokenizerConfig, TrainingConfig
from service.contracts.base import Stored


class Question(Stored):
    """A training whose cost is asked for."""

    pretrain: ModelConfig | None  # None: the tokenizer itself is trained
    tokenizer: TokenizerConfig | None  # frozen beside the model; None: its sizes are unknown, or official
    training: TrainingConfig  # its precision is decided
    workers: int
    on_gpu: bool = False


class MemoryCost(Stored):
    """Bytes on one worker, without the process itself, its cache of pictures and its loaders."""

    model_bytes: int = Field(description="Trained weights and buffers.")
    tokenizer_bytes: int = Field(description="The frozen tokenizer; 0 where the tokenizer is trained.")
    gradients_bytes: int = Field(description="Twice the weights with several workers, which exchange them.")
    optimizer_bytes: int
    activations_bytes: int = Field(description="The most that a forward pass holds, its images included.")
    snapshot_bytes: int = Field(
        default=0,
        description="The first worker's copy for the checkpoint that is being written, in the host's memory:"
        " part of the peak on CPUs, beside it on GPUs.",
    )
    peak_bytes: int = Field(description="The most that the device holds at any moment.")


class Cost(Stored):
    """What the networks of one training take, by part."""

    parameters: dict[str, int] = Field(description="By part; layers that are shared count once.")
    macs_per_image: dict[str, int] = Field(
        description="Multiply-accumulates of a forward pass, by part; FLOPs are twice as many."
    )
    macs_per_training_image: int = Field(
        description="Of a whole step: trained parts three times (forward and backward), frozen ones once."
    )
    memory_per_worker: MemoryCost


class Estimate(Stored):
    """What one job will take. What is not known is left open, and `depends_on` or a warning says why."""

    name: str
    workers: int
    cpus: int
    gpus: int
    steps: int | None = None
    images: int | None = Field(default=None, description="Seen in all, each use of an image counted.")
    epochs: float | None = None
    files: int | None = Field(
        default=None, description="Found at data.uri; those that are no picture will be skipped."
    )
    depends_on: str = Field(default="", description="What steps, images or epochs will still depend on.")
    images_per_pass: int | None = Field(default=None, description="On one worker.")
    precision: str | None = Field(
        default=None, description="Taken for the memory; where the spec leaves it open, the device decides."
    )
    cost: Cost | None = None
