import subprocess
import sys

from service.contracts.specs import KINDS
from workers.train_loop import JOBS, job_of


def test_jobs__every_kind_of_spec_has_a_function() -> None:
    assert set(JOBS) == set(KINDS)
    assert [job_of(kind).__name__ for kind in JOBS] == [name for _, name in JOBS.values()]


def test_driver__does_not_load_timm() -> None:
    code = "import sys, workers.driver; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
