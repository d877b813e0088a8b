from pathlib import Path

from tests.fakes.work_client import FakeWork
from tests.unit.workers.test_callbacks import PLAN, callbacks_of
from workers import rank as module
from workers.attempt import plan_document


def test_reports__begin_with_the_plan_which_the_drivers_may_not_have_reached_the_service(
    tmp_path: Path,
) -> None:
    work = FakeWork()
    rank = callbacks_of(tmp_path, work).rank
    module._begin_reports(rank)
    rank.reporter.flush()
    rank.reporter.close()
    plans = [report.plan for report in work.reports if report.plan is not None]
    assert plans[0] == plan_document(PLAN)
    assert plans[0]["total_steps"] == PLAN.total_steps
