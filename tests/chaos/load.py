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
from service.contracts.jobs import FINAL, Desired
from tests.chaos.journal import Journal

Document = dict[str, Any]
ATTEMPTS, FEW_ATTEMPTS = 50, 2
CANCEL, PAUSE, RESUME, RETRY = "cancel", "pause", "resume", "retry"
_SHARE_OF_PAIRS, _SHARE_OF_DOUBLES, _SHARE_OF_FEW, _SHARE_OF_WISHES = 0.15, 0.25, 0.25, 0.6
_AT_ONCE = 4
_LATEST_S = 15.0  # for a wish of the first kind
_MOST_BETWEEN_S = 8.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Verbs that are sent at once, some time after the wish before."""

    after_s: float
    verbs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One submission, and what its user does to it afterwards."""

    at_s: float
    key: str
    documents: tuple[Document, ...]
    copies: int  # the same request so many times at once
    again_s: float | None  # and once more after that time
    misuse: bool  # and the key once more with another spec
    wishes: tuple[Wish, ...]  # for one of its jobs, once they are accepted
    of: int  # which of them
    at_last: str  # what becomes of a job that is still paused when the storm is over


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
    return Errand(
        at_s=at_s,
        key=f"key-{number:04d}",
        documents=tuple(documents),
        copies=_AT_ONCE if doubled else 1,
        again_s=random.uniform(1, 10) if doubled else None,
        misuse=doubled,
        wishes=_wishes(random),
        of=random.randrange(len(documents)),
        at_last=random.choice((RESUME, RESUME, CANCEL)),
    )


# What a user does to a job, one after the other..
_HABITS: Sequence[tuple[tuple[str, ...], ...]] = (
    ((CANCEL,),),
    ((CANCEL,), (RETRY,)),
    ((PAUSE,), (RESUME,)),
    ((PAUSE,), (RESUME,), (PAUSE,), (RESUME,)),
    ((PAUSE,),),
    ((PAUSE,), (CANCEL,), (RETRY,)),
    ((PAUSE,), (RESUME, CANCEL), (RETRY,)),
    ((PAUSE, RESUME, CANCEL, RETRY), (RETRY, PAUSE), (RESUME, RETRY)),
    ((RETRY,), (RETRY,)),
)


def _wishes(random: Random) -> tuple[Wish, ...]:
    if random.random() >= _SHARE_OF_WISHES:
        return ()
    habit, most = random.choice(_HABITS), _LATEST_S
    wishes = []
    for verbs in habit:
        times = random.choice((1, 3))
        wishes.append(Wish(after_s=random.uniform(0, most), verbs=verbs * times))
        most = _MOST_BETWEEN_S
    return tuple(wishes)


def _tokenizer(random: Random, name: str) -> Document:
    return {
        "kind": "tokenizer",
        "name": name,
        "data": {"uri": "s3://photos/all/"},
        "training": training(random),
        "retries": {"max_attempts": FEW_ATTEMPTS if random.random() < _SHARE_OF_FEW else ATTEMPTS},
        "priority": random.randint(40, 60),
    }


def _pretrain(random: Random, name: str, *, needs: str) -> Document:
    model = {
        "tokenizer": {"source": f"job:{needs}"},
        "enhancer": {"name": "vit_tiny_patch16_224"},
        "objective": {"name": "respix"},
    }
    return {**_tokenizer(random, name), "kind": "pretrain", "model": model}


def training(random: Random) -> Document:
    """A training of some seconds."""
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
        self._verbs = {
            CANCEL: client.cancel,
            PAUSE: client.pause,
            RESUME: client.resume,
            RETRY: client.retry,
        }
        self._pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="user")
        self._futures: list[Future[None]] = []
        self._at_last: dict[str, str] = {}
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self, errands: Sequence[Errand]) -> None:
        """Begin; each errand waits in a thread for its time."""
        began = time.monotonic()
        self._at_last = {d["name"]: errand.at_last for errand in errands for d in errand.documents}
        self._watcher.start()
        threading.Thread(target=self._dispatch, args=(errands, began), name="errands", daemon=True).start()

    def finish(self, num_errands: int, *, within_s: float) -> None:
        """Wait until all has been done that was planned."""
        deadline = time.monotonic() + within_s
        while len(self._futures) < num_errands and time.monotonic() < deadline:
            time.sleep(0.2)
        for future in self._futures:
            future.result(timeout=max(1.0, deadline - time.monotonic()))

    def wake(self) -> None:
        """Let every job that is paused, or about to be, go on or end, as it was planned. Raises ApiError."""
        for job in self._client.jobs(page_size=500):
            if job.desired is Desired.PAUSE and job.state not in FINAL:
                self._ask(self._at_last[job.name], job.id)

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
        for wish in errand.wishes if ids else ():
            time.sleep(wish.after_s)
            asked = ((verb, ids[errand.of]) for verb in wish.verbs)
            _run_all([threading.Thread(target=self._ask, args=args) for args in asked])
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

    def _ask(self, verb: str, job_id: str) -> None:
        facts: dict[str, Any] = {"op": verb, "asked": time.monotonic(), "of": job_id}
        try:
            job = self._verbs[verb](job_id)
        except ApiError as error:
            self._journal.note("call", **facts, error=error.code, told=str(error))
            return
        self._journal.note("call", **facts, jobs=[job.id], states=[job.state])

    def _watch(self) -> None:
        """Note each state that a user could have seen."""
        last: dict[str, str] = {}
        while not self._watching.wait(2.0):
            asked = time.monotonic()
            try:
                for job in self._client.jobs(page_size=500):
                    if last.get(job.id) != job.state:
                        self._journal.note("seen", job=job.id, state=job.state, asked=asked)
                        last[job.id] = job.state
            except ApiError as error:
                self._journal.note("unseen", error=error.code)


def num_open(client: Client) -> int:
    """How many jobs are not final."""
    return sum(job.state not in FINAL for job in client.jobs(page_size=500))


def _run_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
