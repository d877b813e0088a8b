"""What a user submits: one spec, of one of three kinds. Names are those of docs/spec.md.

`parse` lives in `service.contracts.parsing`, which turns every mistake into a dotted path.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cim_core.config import Duration, ModelConfig, TokenizerConfig, TokenizerTrainingConfig, TrainingConfig
from cim_core.limits import LARGEST_SEED, TEMPERATURES
from service.contracts.base import Contract

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=NAME_PATTERN)]
Uri = Annotated[str, Field(min_length=1, max_length=4096)]
MOST_LABELS = 64  # each is a tag in MLflow
# Merged by `parsing` before a spec is made; here it is a record of where its values come from.
Recipe = Annotated[Name | None, Field(description="Name of a recipe; the other keys change what it says.")]


class Data(Contract):
    """Images: a folder, an `s3://bucket/prefix/`, or `.tar` shards (one path or a glob)."""

    uri: Uri


class Resources(Contract):
    """What a job needs of the cluster."""

    workers: int = Field(default=1, ge=1, le=1024)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    cpus_per_worker: int = Field(default=1, ge=1, le=256)


class Retries(Contract):
    """How often a job may start; only causes outside the spec are retried."""

    max_attempts: int = Field(default=3, ge=1, le=100)


class Limits(Contract):
    """Where a job ends even if it is not done."""

    runtime_hours: float | None = Field(
        default=None, gt=0, le=100_000, description="Of all attempts together, without pauses."
    )


class Checkpoints(Contract):
    """Which committed checkpoints stay; the newest one always does."""

    keep_last: int = Field(default=2, ge=1, le=1_000_000)
    keep_every: Duration | None = Field(
        default=None, description="Beside them the first checkpoint at or after each multiple of this."
    )


class Probe(Contract):
    """Labelled images (CLASS/FILE) for a k-NN probe while pre-training."""

    train: Uri
    val: Uri
    every: Duration


class _Spec(Contract):
    """What all kinds share."""

    name: Name
    priority: int = Field(default=50, ge=0, le=100)
    labels: dict[Name, Annotated[str, Field(max_length=256)]] = Field(
        default_factory=dict, max_length=MOST_LABELS
    )
    resources: Resources = Resources()
    retries: Retries = Retries()
    limits: Limits = Limits()


class TokenizerSpec(_Spec):
    """Train a discrete image tokenizer on the user's own images."""

    kind: Literal["tokenizer"]
    recipe: Recipe = None
    data: Data
    model: TokenizerConfig = TokenizerConfig()
    training: TokenizerTrainingConfig
    checkpoints: Checkpoints = Checkpoints()


class PretrainSpec(_Spec):
    """Pre-train an encoder with Corrupted Image Modeling, or with a peer of it."""

    kind: Literal["pretrain"]
    recipe: Recipe = None
    data: Data
    model: ModelConfig
    training: TrainingConfig
    checkpoints: Checkpoints = Checkpoints()
    probe: Probe | None = None


class LabelledData(Contract):
    """Two sets of images in class folders (CLASS/FILE), folder or tar."""

    train: Uri
    val: Uri


class Knn(Contract):
    """Weighted k-nearest-neighbour accuracy on frozen features."""

    name: Literal["knn"] = "knn"
    k: int = Field(default=20, ge=1, le=10_000)
    temperature: float = Field(default=0.07, ge=TEMPERATURES[0], le=TEMPERATURES[1])


class EvaluateSpec(_Spec):
    """Measure an encoder on labelled images, beside the same network with random weights."""

    kind: Literal["evaluate"]
    encoder: Uri = Field(description="job:ID-or-name, or the address of an encoder folder")
    data: LabelledData
    tasks: list[Knn] = Field(default_factory=lambda: [Knn()], min_length=1, max_length=16)
    compare_random: bool = True
    batch_size: int = Field(default=64, ge=1, le=65_536)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    @field_validator("tasks", mode="before")
    @classmethod
    def _bare_names(cls, tasks: object) -> object:
        """Allow `tasks: [knn]` for `tasks: [{name: knn}]`."""
        if not isinstance(tasks, list):
            return tasks
        return [{"name": task} if isinstance(task, str) else task for task in tasks]


Spec = Annotated[TokenizerSpec | PretrainSpec | EvaluateSpec, Field(discriminator="kind")]
KINDS = ("tokenizer", "pretrain", "evaluate")
