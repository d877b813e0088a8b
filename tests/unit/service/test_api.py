"""The contracts of the API on SQLite; tests/integration/test_postgres.py runs them on PostgreSQL."""

from tests.fakes.artifact_contract import ArtifactContract
from tests.fakes.claim_contract import ClaimContract
from tests.fakes.finish_contract import FinishContract
from tests.fakes.json_contract import JsonContract
from tests.fakes.moves_contract import MovesContract
from tests.fakes.number_contract import NumberContract
from tests.fakes.readiness_contract import ReadinessContract
from tests.fakes.submit_contract import ListContract, SubmitContract
from tests.fakes.wish_contract import WishContract
from tests.fakes.work_contract import DetailContract, WorkContract


class TestSubmit(SubmitContract): ...


class TestList(ListContract): ...


class TestNumbers(NumberContract): ...


class TestReadiness(ReadinessContract): ...


class TestJson(JsonContract): ...


class TestWishes(WishContract): ...


class TestMoves(MovesContract): ...


class TestClaim(ClaimContract): ...


class TestWork(WorkContract): ...


class TestFinish(FinishContract): ...


class TestDetails(DetailContract): ...


class TestArtifacts(ArtifactContract): ...
