"""Pages of `GET /v1/jobs` over a million jobs, by what is asked for, beside a page of the baseline."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx

from benchmarks.timing import Times, in_turns

BASELINE = "the baseline's page"
_ROUNDS, _WARMUP = 15, 2
_OLD = timedelta(days=6)


def measure(api: str, bare: str, *, num_things: int = 200) -> dict[str, Times]:
    """Seconds of each page of 50, all in turns."""
    with httpx.Client(trust_env=False, timeout=60) as http:
        for _ in range(num_things):
            http.post(f"{bare}/things", json=_whole(http, api)).raise_for_status()
        asked: dict[str, Callable[[], object]] = {BASELINE: partial(_get, http, f"{bare}/things", {})}
        for name, params in _pages().items():
            asked[name] = partial(_get, http, f"{api}/v1/jobs", params)
        return in_turns(asked, rounds=_ROUNDS, warmup=_WARMUP)


def _pages() -> Mapping[str, dict[str, str]]:
    """What is asked for; names and labels are those of `benchmarks.load.database`."""
    moment = (datetime.now(UTC) - _OLD).isoformat()
    old = base64.urlsafe_b64encode(json.dumps([moment, "8" * 16]).encode()).decode()
    return {
        "newest": {},
        "six days back": {"cursor": old},
        "state=queued": {"state": "queued"},
        "state=failed": {"state": "failed"},
        "state=failed, six days back": {"state": "failed", "cursor": old},
        "state=paused (none)": {"state": "paused"},
        "kind=tokenizer": {"kind": "tokenizer"},
        "kind=none (none)": {"kind": "none"},
        "name=vit-424242 (one)": {"name": "vit-424242"},
        "label team=t7 (2 %)": {"label": "team=t7"},
        "label sweep=s500 (200)": {"label": "sweep=s500"},
        "label sweep=s500 and state=failed": {"label": "sweep=s500", "state": "failed"},
        "label x=y (none)": {"label": "x=y"},
        "q=vit (half)": {"q": "vit"},
        "q=t-42424 (few)": {"q": "t-42424"},
        "q=nobody (none)": {"q": "nobody"},
    }


def beginnings(api: str) -> Iterator[str]:
    """The newest jobs' ids, cut to eight characters, as people type them."""
    with httpx.Client(trust_env=False) as http:
        for job in http.get(f"{api}/v1/jobs").raise_for_status().json()["jobs"]:
            yield job["id"][:8]


def measure_lookup(api: str) -> Times:
    """Seconds to show the job of the beginning of an id."""
    with httpx.Client(trust_env=False, timeout=60) as http:
        ids = beginnings(api)
        found = in_turns(
            {"show": lambda: _get(http, f"{api}/v1/jobs/{next(ids)}", {})}, rounds=_ROUNDS, warmup=_WARMUP
        )
    return found["show"]


def _get(http: httpx.Client, url: str, params: Mapping[str, str]) -> None:
    http.get(url, params=dict(params)).raise_for_status()


def _whole(http: httpx.Client, api: str) -> object:
    """A job as the api shows it: the baseline's rows shall be no smaller."""
    return http.get(f"{api}/v1/jobs", params={"limit": "1"}).raise_for_status().json()["jobs"][0]
