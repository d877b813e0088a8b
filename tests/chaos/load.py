"""What the users of a campaign do: a plan made from the seed alone, carried out by threads."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

from service.client import Client
from service.client.errors import ApiError
from service.contracts.jobs import FINAL
from tests.chaos.journal import Journal

Document = dict[str, Any]
ATTEMPTS = 50
_SHARE_OF_PAIRS, _SHARE_OF_DOUBLES, _SHARE_OF_CANCELS = 0.15, 0.25, 0.25
_AT_ONCE = 4
_LATEST_CANCEL_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One submission, and what its user does to it afterwards."""

    at_s: float
    key: str
    documents: tuple[Document, ...]
    copies: int  # the same request so many times at once
    again_s: float | None  # and once more after that time
    misuse: bool  # and the key once more with another spec
    cancel_s: float | None  # the first job is cancelled so long after it was accepted
    cancels: int  # so many times at once


def plan(seed: int, *, jobs: int, over_s: float) -> list[Errand]:
    """Errands for about `jobs` jobs, spread over the time. Pure."""
    random, made = Random(seed), 0
    errands: list[Errand] = []
    while made < jobs:
        errand = _errand(random, number=len(errands), at_s=over_s * made / jobs)
        made += len(errand.documents)
        errands.append(errand)
    return errands


def _errand(random: Random, *, number: int, at_s: float) -> Errand:
    name = f"c{number:04d}"
    documents = [_tokenizer(random, name)]
    if random.random() < _SHARE_OF_PAIRS:
        documents.append(_pretrain(random, f"{name}-next", needs=name))
    doubled = random.random() < _SHARE_OF_DOUBLES
    cancelled = random.random() < _SHARE_OF_CANCELS
    return Errand(
        at_s=at_s,
        key=f"key-{number:04d}",
        documents=tuple(documents),
        copies=_AT_ONCE if doubled else 1,
        again_s=random.uniform(1, 10) if doubled else None,
        misuse=doubled,
        cancel_s=random.uniform(0, _LATEST_CANCEL_S) if cancelled else None,
        cancels=random.choice((1, 3)),
    )


def _tokenizer(random: Random, name: str) -> Document:
    return {
        "kind": "tokenizer",
        "name": name,
        "data": {"uri": "s3://photos/all/"},
        "training": _training(random),
        "retries": {"max_attempts": ATTEMPTS},
        "priority": random.randint(40, 60),
    }


def _pretrain(random: Random, name: str, *, needs: str) -> Document:
    model = {
        "tokenizer": {"source": f"job:{needs}"},
        "enhancer": {"name": "vit_tiny_patch16_224"},
        "objective": {"name": "respix"},
    }
    return {**_tokenizer(random, name), "kind": "pretrain", "model": model}


def _training(random: Random) -> Document:
    every = random.choice((7, 12, 25))
    return {
        "steps": random.randint(40, 150),
        "batch_size": 4,
        "seed": random.randrange(10**6),
        "checkpoint_every": {"steps": every},
        "sample_every": {"steps": 2 * every},
    }


class Users:
    """Carries a plan out."""

    def __init__(self, client: Client, journal: Journal) -> None:
        self._client, self._journal = client, journal
        self._pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="user")
        self._futures: list[Future[None]] = []
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self, errands: Sequence[Errand]) -> None:
        """Begin; each errand waits in a thread for its time."""
        began = time.monotonic()
        self._watcher.start()
        threading.Thread(target=self._dispatch, args=(errands, began), name="errands", daemon=True).start()

    def finish(self, num_errands: int, *, within_s: float) -> None:
        """Wait until all has been done that was planned."""
        deadline = time.monotonic() + within_s
        while len(self._futures) < num_errands and time.monotonic() < deadline:
            time.sleep(0.2)
        for future in self._futures:
            future.result(timeout=max(1.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End the threads."""
        self._watching.set()
        self._watcher.join(timeout=30)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _dispatch(self, errands: Sequence[Errand], began: float) -> None:
        for errand in errands:
            time.sleep(max(0.0, began + errand.at_s - time.monotonic()))
            self._futures.append(self._pool.submit(self._run, errand))

    def _run(self, errand: Errand) -> None:
        ids = self._at_once([errand.documents] * errand.copies, key=errand.key)
        if errand.cancel_s is not None and ids:
            time.sleep(errand.cancel_s)
            threads = [threading.Thread(target=self._cancel, args=(ids[0],)) for _ in range(errand.cancels)]
            _run_all(threads)
        if errand.again_s is not None:
            time.sleep(errand.again_s)
            self._submit(errand.documents, key=errand.key)
        if errand.misuse:
            self._submit([{**errand.documents[0], "priority": 1}], key=errand.key)

    def _at_once(self, copies: Sequence[Sequence[Document]], *, key: str) -> list[str]:
        answers: list[list[str]] = []
        threads = [
            threading.Thread(target=lambda d=d: answers.append(self._submit(d, key=key))) for d in copies
        ]
        _run_all(threads)
        return next((ids for ids in answers if ids), [])

    def _submit(self, documents: Sequence[Document], *, key: str) -> list[str]:
        facts: dict[str, Any] = {"op": "submit", "key": key, "names": [d["name"] for d in documents]}
        facts |= {"asked": time.monotonic(), "priorities": [d["priority"] for d in documents]}
        try:
            jobs = self._client.submit(list(documents), idempotency_key=key)
        except ApiError as error:
            self._journal.note("call", **facts, error=error.code, told=str(error))
            return []
        ids = [job.id for job in jobs]
        self._journal.note("call", **facts, jobs=ids, states=[job.state for job in jobs])
        return ids

    def _cancel(self, job_id: str) -> None:
        facts: dict[str, Any] = {"op": "cancel", "asked": time.monotonic()}
        try:
            job = self._client.cancel(job_id)
        except ApiError as error:
            self._journal.note("call", **facts, error=error.code, told=str(error), cancelled=job_id)
            return
        self._journal.note("call", **facts, jobs=[job.id], states=[job.state])

    def _watch(self) -> None:
        """Note each state that a user could have seen."""
        last: dict[str, str] = {}
        while not self._watching.wait(2.0):
            try:
                for job in self._client.jobs(page_size=500):
                    if last.get(job.id) != job.state:
                        self._journal.note("seen", job=job.id, state=job.state)
                        last[job.id] = job.state
            except ApiError as error:
                self._journal.note("unseen", error=error.code)


def all_final(client: Client) -> bool:
    """Whether no job is open."""
    return all(job.state in FINAL for job in client.jobs(page_size=500))


def _run_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
