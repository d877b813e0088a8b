"""No path of an artifact climbs out of its job, whatever the object store."""

import itertools
from urllib.parse import quote

import pytest

from tests.fakes.work_contract import running
from tests.fakes.world import World

SECRET = b"belongs to another job"
UP = ["..", "%2e%2e", ".%2E", "%252e%252e", "..;", "...", "..%00", "\u2025", "%c0%ae%c0%ae", "..\\", "~"]
SLASHES = ["/", "%2f", "%5c", "//", "/./", "%252f"]
WRITTEN = ["../x", "a/../x", "/x", "a//b", ".", "./a", "a/.", "a\\b", "a/", "", "a\nb", "x" * 1025]


def climbing(job_id: str, other: str) -> list[str]:
    """Ways that might lead to another job's file, or to one beside the store."""
    targets = ["secret.bin", f"jobs/{other}/secret.bin", f"{other}/secret.bin", "cim.db", "etc/passwd"]
    ups = [slash.join([up] * depth) + slash for up in UP for slash in SLASHES for depth in (1, 2, 4)]
    plain = [
        *targets,
        *(f"/{target}" for target in targets),
        f"file:///{targets[1]}",
        f"samples/{targets[1]}",
    ]
    return [*plain, *(up + target for up, target in itertools.product(ups, targets[1:4]))]


class ArtifactContract:
    async def test_fetch__no_path_climbs_out_of_the_job(self, world: World) -> None:
        job_id, other = await running(world), await running(world, name="other")
        world.file(other, "secret.bin", SECRET)
        await world.report(other, 1, files=[world.file(other, "named.bin", SECRET)])
        await world.report(job_id, 1, files=[world.file(job_id, "samples/a.bin", b"mine")])
        assert (await world.client.get(f"/v1/jobs/{job_id}/artifacts/samples/a.bin")).status_code in (
            200,
            307,
        )
        for path in climbing(job_id, other):
            for address in (path, quote(path)):
                answer = await world.client.get(f"/v1/jobs/{job_id}/artifacts/{address}")
                assert answer.status_code in (400, 404), address
                assert SECRET not in answer.content

    @pytest.mark.parametrize("path", WRITTEN)
    async def test_report__no_manifest_names_such_a_path(self, world: World, path: str) -> None:
        job_id = await running(world)
        entry = {"path": path, "size": 1, "sha256": "0" * 64}
        told = {"step": 10, "outcome": "succeeded", "total_steps": 10, "files": [entry]}
        saved = {"step": 1, "prefix": "attempts/1/checkpoints/step-1", "files": [entry]}
        assert (await world.report(job_id, 1, files=[entry])).status_code == 422
        assert (await world.tell(job_id, 1, "finish", told)).status_code == 422
        assert (await world.tell(job_id, 1, "checkpoints", saved)).status_code == 422
        assert (await world.client.get(f"/v1/jobs/{job_id}/artifacts")).json() == []
