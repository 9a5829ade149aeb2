"""The targets of `./dev fuzz --atheris` and its command line, without atheris (`./dev fuzz -k targets`)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import guided
from tests.fuzz.targets import TARGETS, kept


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_wherever_they_are_cut(name: str) -> None:
    function, seeds = TARGETS[name]
    assert seeds
    for seed in seeds:
        for cut in range(len(seed) + 1):
            function(seed[:cut])
            function(seed[cut:])


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_what_earlier_searches_have_learnt(name: str) -> None:
    octets = kept(name)
    assert octets
    for each in octets:
        TARGETS[name].function(each)


@pytest.mark.parametrize("name", TARGETS)
@given(octets=st.binary(max_size=100))
def test_a_target_takes_any_octets(name: str, octets: bytes) -> None:
    function, seeds = TARGETS[name]
    function(octets)
    function(seeds[0] + octets)


# the command line, with a search that finds something in one target


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where it searched, and for how long."""
    calls: list[tuple[str, int]] = []

    def is_clean(name: str, seconds: int) -> bool:
        calls.append((name, seconds))
        return name != "spf"

    monkeypatch.setattr(guided, "_is_clean", is_clean)
    return calls


def test_searches_in_the_targets_that_are_named_once_each(searched: list[tuple[str, int]]) -> None:
    assert guided.main(["tags", "dmarc", "tags", "--seconds", "7"]) == 0
    assert searched == [("tags", 7), ("dmarc", 7)]


def test_a_finding_stops_no_other_search_and_is_told(
    searched: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guided.main([]) == 1
    assert searched == [(name, guided.SECONDS) for name in TARGETS]
    assert "FOUND something in: spf;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tags", "tgas"], "there is no target tgas; there are address, arc"),
        (["--seconds", "0"], "'0' is no number of seconds"),
        (["--seconds", "-1"], "'-1' is no number of seconds"),
        (["--seconds", "\u0663"], "is no number of seconds"),
    ],
)
def test_refuses_what_it_cannot_search(
    words: list[str], said: str, searched: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        guided.main(words)
    assert said in capsys.readouterr().err
    assert searched == []
