"""Batches made ahead of time, in the order of the stream, from any step on.

With `num_workers` 0 threads of this process decode (Pillow lets go of the interpreter lock while it
decodes and resizes); else processes started by a fork server, since a fork of a process that has
threads may hang. The batches are the same either way.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from torch.utils.data import DataLoader

from cim_core.data.dataset import ImageDataset, Views, collate
from cim_core.data.sampler import SampleId, Stream, equal_share
from cim_core.seeding import generator_for

STEPS_AHEAD = 2
MAX_THREADS = 8


class ImageLoader:
    """One rank's batches; satisfies `cim_core.engine.fit.StepLoader`."""

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin: bool = False,
    ) -> None:
        """Prepare `rank`'s part of batches of `batch_size` over all ranks; `pin` where they go to a GPU.

        Raises:
            ConfigError: the batch cannot be divided equally among ranks and micro-batches.
        """
        equal_share(batch_size, world_size * accumulation)
        self.stream = Stream(num_images=len(dataset), batch_size=batch_size, seed=dataset.views.seed)
        self._dataset = dataset
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._pin = pin

    def steps(self, start: int, stop: int) -> Generator[Views, None, None]:
        """The batch of each step from `start` up to, not including, `stop`."""
        if start >= stop:
            return
        made = self._by_processes(start, stop) if self._num_workers else self._by_threads(start, stop)
        for views in made:
            yield views.pin() if self._pin else views

    def samples(self, step: int) -> list[SampleId]:
        """This rank's samples of the step that follows `step` completed ones."""
        return self.stream.batch(step, rank=self._rank, world_size=self._world_size)

    def _by_threads(self, start: int, stop: int) -> Generator[Views, None, None]:
        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="decode")
        coming: Iterator[list[Future[Views]]] = (
            [pool.submit(self._dataset.__getitem__, sample) for sample in self.samples(step)]
            for step in range(start, stop)
        )
        try:
            queue = deque(islice(coming, STEPS_AHEAD))
            while queue:
                views = collate([future.result() for future in queue.popleft()])
                queue.extend(islice(coming, 1))
                yield views
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _by_processes(self, start: int, stop: int) -> Iterator[Views]:
        loader: DataLoader[Views] = DataLoader(
            self._dataset,  # type: ignore[arg-type]  # keyed by SampleId, which torch's types do not foresee
            batch_sampler=_Batches(self, start, stop),
            num_workers=self._num_workers,
            collate_fn=collate,
            multiprocessing_context="forkserver",
            prefetch_factor=STEPS_AHEAD,
            # Without it torch would draw the processes' seeds from the global generator.
            generator=generator_for(self.stream.seed, "loader"),
        )
        return iter(loader)


class _Batches:
    """What `DataLoader` calls a batch sampler."""

    def __init__(self, loader: ImageLoader, start: int, stop: int) -> None:
        self._loader = loader
        self._steps = range(start, stop)

    def __iter__(self) -> Iterator[list[SampleId]]:
        return map(self._loader.samples, self._steps)

    def __len__(self) -> int:
        return len(self._steps)
