"""`python -m workers --url URL --attempt JOB_ID/N`: the entrypoint of a Ray job.

The code that claims the attempt comes from the environment, CIM_CLAIM_CODE. Exit status: see
`workers.failures.ExitCode`.
"""

import argparse
import logging
import os
import signal
import sys
from types import FrameType

from workers.driver import run
from workers.failures import ExitCode
from workers.logs import BlottingFormatter
from workers.settings import UsageError, WorkerSettings, secrets_of

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(arguments: list[str] | None = None) -> int:
    """Run one attempt; the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m workers", description="Run one attempt of a job.")
    parser.add_argument("--url", required=True, help="address of the service, e.g. http://127.0.0.1:8000")
    parser.add_argument("--attempt", required=True, metavar="JOB_ID/N", help="which attempt of which job")
    given = parser.parse_args(arguments)
    try:
        settings = WorkerSettings.read(given.url, given.attempt, os.environ)
    except UsageError as error:
        parser.exit(ExitCode.USAGE, f"{error}\n")
    printing = logging.StreamHandler()
    printing.setFormatter(BlottingFormatter(_LINE, secrets=secrets_of(settings)))
    logging.basicConfig(level=logging.WARNING, handlers=[printing])
    signal.signal(signal.SIGTERM, _terminate)
    return run(settings)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    # Ray kills three seconds after it asks, so nothing is finished here: logs go out, and that is all.
    raise SystemExit(ExitCode.TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
