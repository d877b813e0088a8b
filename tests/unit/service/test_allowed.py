"""Which storage a spec may name."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from service.contracts.allowed import ANYWHERE, DALL_E_FILES, EVERYTHING, Allowed, allowed_by, prefixes_in
from service.settings import Settings
from tests.fakes.world import World, open_world

LISTED = "/data, /srv/photos/, s3://photos, s3://team/public/, https://models.example.org/cim"
ALLOWED = allowed_by(prefixes_in(LISTED), store_url="s3://cim/artifacts")

INSIDE = [
    "/data",
    "/data/",
    "/data/photos",
    "/data//photos/./deep",
    "/data/shard-{000..007}.tar",
    "/data/{train,val}/*.tar",
    "/data/...",
    "/data/..photos",
    "/srv/photos/x",
    "s3://photos",
    "s3://photos/any/thing",
    "s3://team/public/x",
    "s3://team/public",
    "s3://cim/artifacts/jobs/0123456789abcdef/encoder",
    "https://models.example.org/cim/encoder.pkl",
    "https://MODELS.example.org:443/cim/encoder.pkl?download=true",
    f"{DALL_E_FILES}/encoder.pkl",
]
OUTSIDE = [
    "/",
    "/database",
    "/data-of-others/x",
    "/dat",
    "/srv",
    "/srv/photos2",
    "//etc/passwd",
    "s3://photos-of-others/x",
    "s3://photo",
    "s3://team",
    "s3://team/private",
    "s3://team/public-not",
    "s3://cim",
    "s3://cim/artifacts-of-others",
    "https://models.example.org/cimx/encoder.pkl",
    "https://models.example.org/",
    "https://models.example.org:8443/cim/encoder.pkl",
    "https://models.example.org.evil.net/cim/encoder.pkl",
    "https://evil.net/models.example.org/cim",
    "https://evil.net/cim?x=https://models.example.org/cim",
    "http://models.example.org/cim/encoder.pkl",
    "http://169.254.169.254/latest/meta-data",
    "https://cdn.openai.com/dall-e-other/encoder.pkl",
]
CLIMBING = [
    "/data/../etc",
    "/data/..",
    "/data/{a,..}/etc",
    "/data/{.,a}{.,b}/etc/x.tar",
    "/data/.{,a}./etc",
    "/data/{a,../../etc/b}",
    "/data/{a/.,c}{./d,e}",
    "/data/{{a,.},..}/x.tar",
    "/data/{x{a,b},..}/etc",
    "s3://photos/../team/private",
    "s3://team/public/./../private",
    "https://models.example.org/cim/../other",
    "https://models.example.org/cim/%2e%2e/other",
    "https://models.example.org/cim/%2E./other",
    "https://models.example.org/cim/%252e%252e/other",
    "https://models.example.org/cim/..%2fother",
    "https://models.example.org/cim/..\\other",
    "https://models.example.org/cim/%5c..%5cother",
    "https://models.example.org/cim#/../other",
]


@pytest.mark.parametrize("address", INSIDE)
def test_fault__what_lies_below_a_prefix_is_allowed(address: str) -> None:
    assert ALLOWED.fault(address) == ""


@pytest.mark.parametrize("address", OUTSIDE)
def test_fault__what_lies_beside_is_not_and_says_what_would_be(address: str) -> None:
    told = ALLOWED.fault(address)
    assert "must lie below one of the places that this service allows" in told
    assert "s3://photos" in told
    assert "CIM_ALLOWED_STORAGE" in told


@pytest.mark.parametrize("address", CLIMBING)
def test_fault__no_path_climbs_out(address: str) -> None:
    assert "must not hold the part" in ALLOWED.fault(address)


@given(
    st.lists(
        st.sampled_from(
            [
                "..",
                ".",
                "",
                "a",
                "{a,..}",
                "{x{a,b},..}",
                "{.,b}{.,c}",
                ".{,a}",
                "%2e%2e",
                "{0..2}",
                "*",
                "...",
            ]
        )
    ).map("/".join)
)
def test_fault__what_it_lets_pass_never_leaves_the_folder_however_it_is_written_out(path: str) -> None:
    if ALLOWED.fault(f"/data/{path}"):
        return
    for one in _all_of(f"/data/{path}"):
        assert Path("/data") in [(resolved := Path(_normal(one))), *resolved.parents]


def _all_of(pattern: str) -> list[str]:
    """Every way to write out the braces, the slow way."""
    start = pattern.rfind("{")
    if start < 0:
        return [pattern]
    end = pattern.index("}", start)
    inner = pattern[start + 1 : end]
    choices = ["0", "1", "2"] if inner == "0..2" else inner.split(",")
    return [one for choice in choices for one in _all_of(pattern[:start] + choice + pattern[end + 1 :])]


def _normal(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def test_everything__is_everything() -> None:
    for address in [*INSIDE, *OUTSIDE, "/data/../etc", "/data/{a,..}/etc"]:
        assert ANYWHERE.fault(address) == ""


def test_nothing_listed__leaves_the_own_store_and_openais_files() -> None:
    bare = allowed_by((), store_url="/srv/objects")
    assert bare.fault("/srv/objects/jobs/x/encoder") == ""
    assert bare.fault(f"{DALL_E_FILES}/decoder.pkl") == ""
    for address in ("/srv", "/srv/objects-2", "/data", "s3://bucket/x", "https://example.org/x"):
        assert bare.fault(address)


@pytest.mark.parametrize(
    "entry",
    [
        "data",
        "~/data",
        "ftp://host",
        "file:///data",
        "s3:/bucket",
        "/data/../etc",
        "/data/*",
        "s3://a/{b,c}",
        "https://user@host/",
        "https://host/%2e%2e/x",
        "gs://bucket",
        "s3://bucket/../x",
    ],
)
def test_settings__a_prefix_that_is_none_ends_the_start(entry: str) -> None:
    with pytest.raises(ValidationError, match="must be a comma-separated list") as caught:
        Settings(
            database_url="sqlite+aiosqlite:///x",
            store_url="/x",
            ray_url="http://r",
            public_url="http://a",
            secret=SecretStr("s" * 32),
            allowed_storage=f"/fine,{entry}",
        )
    assert entry in str(caught.value)


def test_prefixes__empty_entries_and_spaces_do_not_matter() -> None:
    assert prefixes_in(" /a , ,s3://b/c,") == ("/a", "s3://b/c")
    assert prefixes_in("") == ()
    assert Allowed(prefixes=prefixes_in(EVERYTHING)) == ANYWHERE


async def test_submit__what_is_not_allowed_is_refused_and_not_looked_at(
    database_url: str, tmp_path: Path
) -> None:
    async with open_world(database_url, tmp_path, allowed_storage=f"{tmp_path}/images") as world:
        await _check(world, tmp_path)


async def _check(world: World, folder: Path) -> None:
    (folder / "outside").mkdir()
    (folder / "outside" / "a.png").touch()
    (folder / "images" / "link").symlink_to(folder / "outside")
    (job,) = await world.submit(world.tokenizer())
    await world.launch(job["id"])
    assignment = (await world.ask(job["id"], 1)).json()
    assert assignment["allowed"] == [f"{folder}/images", f"{folder}/store", f"{DALL_E_FILES}/"]
    for uri, word in (
        (f"{folder}/outside", "must lie below"),
        (f"{folder}/nowhere", "must lie below"),  # the same answer: it tells nothing of what is there
        (f"{folder}/images/../outside", "must not hold the part"),
        (f"{folder}/images/link", "through a link"),
        (f"{folder}/images/link/*.tar", "through a link"),
        ("s3://bucket/x", "must lie below"),
    ):
        for address in ("/v1/jobs", "/v1/jobs/validate"):
            answer = await world.client.post(address, json=world.tokenizer(data={"uri": uri}))
            (error,) = answer.json()["errors"]
            assert (answer.status_code, error["path"]) == (422, "data.uri")
            assert word in error["message"]
            assert uri in error["message"]
    # Every key that may hold an address is judged.
    probe = {"train": "/etc", "val": "s3://b/c", "every": {"epochs": 1}}
    refused = await world.refused(world.pretrain(source="/etc", probe=probe), world.evaluate(encoder="/etc"))
    assert {path.partition("].")[2] for path in refused} == {
        "model.tokenizer.source",
        "probe.train",
        "probe.val",
        "encoder",
    }
