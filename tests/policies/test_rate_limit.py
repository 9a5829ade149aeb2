"""rate_limit: tokens are taken for what the operator asked, and nobody is deferred for another's mail."""

from __future__ import annotations

import pytest

from gateway.api import Action, AddressSource, AuthResult, OnError, Result, Stage, StoreDownError, Trust
from gateway.testing import Client, Harness, PolicyContract
from policies.rate_limit import Limit, Per, RateLimit, RateLimitSettings

SPF = AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", "ann@mail.client.example"),))


def limits(*given: Limit) -> RateLimitSettings:
    return RateLimitSettings(given)


class TestContract(PolicyContract):
    policy = RateLimit
    settings = limits(Limit(Per.CLIENT, 10), Limit(Per.SENDER, 10), Limit(Per.RECIPIENT, 10))


def codes(harness: Harness[RateLimit], count: int, **given: object) -> list[int]:
    """What the last recipient of so many messages is told."""
    return [harness.deliver(**given).replies[1].code for _ in range(count)]  # type: ignore[arg-type]  # keywords


def test_who_sends_too_much_waits_until_a_token_comes_back() -> None:
    with Harness(RateLimit, limits(Limit(Per.CLIENT, 3, within_s=300))) as harness:
        assert codes(harness, 4) == [250, 250, 250, 450]
        played = harness.deliver()
        assert (
            str(played.reply)
            == "450 4.7.1 Too much mail from your network now, please try again in 100 seconds"
        )
        verdict = played.verdict(Stage.RCPT)
        assert verdict.reason == "too_much_per_client"
        assert verdict.evidence is not None
        assert [*verdict.evidence.lines()] == [
            "client 3/300/0 192.0.2.0/24: 3 in 300 s, and there is none left"
        ]
        assert harness.metrics["mxgate_rate_limit_deferred_total", "client"] == 2
        harness.clock.advance(99)
        assert codes(harness, 1) == [450]
        harness.clock.advance(1)
        assert codes(harness, 2) == [250, 450]


@pytest.mark.parametrize("count", [1, 3, 7, 60, 97, 333])
@pytest.mark.parametrize("within_s", [1.0, 60.0, 3600.0, 86_400.0])
def test_a_bucket_holds_exactly_what_the_operator_said(count: int, within_s: float) -> None:
    limit = Limit(Per.RECIPIENT, count, within_s)
    with Harness(RateLimit, limits(limit)) as harness:
        replies = harness.deliver(rcpts=["bob@example.org"] * (count + 1)).replies
        assert [each.code for each in replies[1 : count + 2]] == [250] * count + [450]


def test_a_burst_is_how_much_may_come_at_once() -> None:
    with Harness(RateLimit, limits(Limit(Per.CLIENT, 60, within_s=60, burst=2))) as harness:
        assert codes(harness, 3) == [250, 250, 450]
        harness.clock.advance(1)
        assert codes(harness, 2) == [250, 450]


def test_each_recipient_takes_one_token_in_one_round_trip() -> None:
    trips = 0
    with Harness(RateLimit, limits(Limit(Per.CLIENT, 5), Limit(Per.RECIPIENT, 5))) as harness:
        run = harness.store.run

        async def counted(operations: object) -> object:
            nonlocal trips
            trips += 1
            return await run(operations)  # type: ignore[arg-type]  # passed on

        harness.store.run = counted  # type: ignore[method-assign,assignment]  # counts
        replies = harness.deliver(rcpts=[f"bob{n}@example.org" for n in range(6)]).replies
    assert [each.code for each in replies[1:7]] == [250] * 5 + [450]
    # and one more to give back what the refused one had taken for its recipient
    assert trips == 7


def test_clients_of_one_network_share_and_others_do_not() -> None:
    with Harness(RateLimit, limits(Limit(Per.CLIENT, 1))) as harness:
        assert codes(harness, 1, client="192.0.2.1") == [250]
        assert codes(harness, 1, client="192.0.2.99") == [450]
        assert codes(harness, 1, client="198.51.100.1") == [250]
        assert codes(harness, 1, client="2001:db8::1") == [250]
        assert codes(harness, 1, client="2001:db8::ffff") == [450]
        assert codes(harness, 1, client="2001:db8:0:1::1") == [250]
    with Harness(RateLimit, RateLimitSettings((Limit(Per.CLIENT, 1),), ipv4_prefix=32)) as harness:
        assert codes(harness, 1, client="192.0.2.1") == [250]
        assert codes(harness, 1, client="192.0.2.99") == [250]


def test_a_sender_that_spf_proved_has_one_bucket_wherever_it_sends_from() -> None:
    with Harness(RateLimit, limits(Limit(Per.SENDER, 1)), results=[SPF]) as harness:
        assert codes(harness, 1, client="192.0.2.1", mail_from="ann@mail.client.example") == [250]
        assert codes(harness, 1, client="198.51.100.1", mail_from="bob@mail.client.example") == [450]


def test_a_name_that_is_not_proved_counts_for_its_network_alone() -> None:
    with Harness(RateLimit, limits(Limit(Per.SENDER, 1))) as harness:
        assert codes(harness, 1, client="192.0.2.1") == [250]
        assert codes(harness, 1, client="192.0.2.2") == [450]
        assert codes(harness, 1, client="198.51.100.1") == [250], "nobody empties it in another's name"
        assert codes(harness, 1, client="192.0.2.1", mail_from="") == [250]
        assert codes(harness, 1, client="192.0.2.1", mail_from="") == [450]


def test_a_user_is_counted_wherever_he_is_and_however_he_writes_his_name() -> None:
    def user(client: str, name: str | None) -> Client:
        return Client(client, trust=Trust.AUTHENTICATED if name else Trust.UNTRUSTED, user=name)

    with Harness(RateLimit, limits(Limit(Per.USER, 2))) as harness:
        assert codes(harness, 1, client=user("192.0.2.1", "ann@example.org")) == [250]
        assert codes(harness, 1, client=user("198.51.100.1", "Ann@Example.org")) == [250]
        played = harness.deliver(client=user("2001:db8::1", "ann@example.org"))
        assert str(played.replies[1]).startswith("450 4.7.1 Too much mail of yours now")
        assert codes(harness, 1, client=user("192.0.2.1", "eve@example.org")) == [250]
        # nobody has authenticated on port 25
        assert codes(harness, 9, client=user("192.0.2.1", None)) == [250] * 9


def test_a_recipient_is_counted_whoever_sends_and_in_any_case() -> None:
    with Harness(RateLimit, limits(Limit(Per.RECIPIENT, 2))) as harness:
        assert codes(harness, 1, client="192.0.2.1", rcpts=["bob@example.org"]) == [250]
        assert codes(harness, 1, client="198.51.100.1", rcpts=["BOB@EXAMPLE.ORG"]) == [250]
        assert codes(harness, 1, client="203.0.113.1", rcpts=["bob@example.org"]) == [450]
        assert codes(harness, 1, rcpts=["eve@example.org"]) == [250]


def test_what_one_limit_refuses_takes_nothing_of_the_others() -> None:
    settings = limits(Limit(Per.RECIPIENT, 10), Limit(Per.CLIENT, 1))
    with Harness(RateLimit, settings) as harness:
        assert codes(harness, 30, client="192.0.2.1").count(450) == 29
        # a flood from one network does not close the mailbox for the others
        assert [codes(harness, 1, client=f"198.51.{n}.1")[0] for n in range(10)] == [250] * 9 + [450]


def test_two_limits_of_a_kind_both_count() -> None:
    settings = limits(Limit(Per.CLIENT, 2, within_s=2), Limit(Per.CLIENT, 3, within_s=3600))
    with Harness(RateLimit, settings) as harness:
        assert codes(harness, 3) == [250, 250, 450]
        harness.clock.advance(2)
        assert codes(harness, 2) == [250, 450]


def test_without_limits_nothing_is_counted() -> None:
    with Harness(RateLimit) as harness:
        assert harness.deliver().reply.code == 250
        assert harness.store.asked == []


def test_trusted_clients_and_those_that_are_hidden_do_not_count() -> None:
    with Harness(RateLimit, limits(Limit(Per.CLIENT, 1), Limit(Per.SENDER, 1))) as harness:
        assert codes(harness, 3, client=Client(trust=Trust.TRUSTED)) == [250] * 3
        assert codes(harness, 3, client=Client(source=AddressSource.HIDDEN)) == [250] * 3
        assert harness.store.asked == []


@pytest.mark.parametrize(("on_outage", "code"), [(OnError.CONTINUE, 250), (OnError.DEFER, 451)])
def test_while_the_store_is_down_the_operator_decides(on_outage: OnError, code: int) -> None:
    with Harness(RateLimit, limits(Limit(Per.CLIENT, 1))) as harness:
        harness.store.error = StoreDownError("timeout", on_outage)
        played = harness.deliver()
        assert played.replies[1].code == code
        assert played.verdict(Stage.RCPT).reason == "store_down"
        assert played.verdict(Stage.RCPT).action is not Action.REJECT


@pytest.mark.parametrize(
    "given",
    [
        {"count": 0},
        {"count": 1, "burst": 2},
        {"count": 1, "burst": -1},
        {"count": 1, "within_s": 0.0},
        {"count": 1, "within_s": float("nan")},
        {"count": 1, "within_s": 32 * 86_400.0},
        {"count": 2000, "within_s": 1.0},
    ],
)
def test_a_limit_that_cannot_be_is_told(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"count|within_s"):
        Limit(Per.CLIENT, **given)  # type: ignore[arg-type]  # counts are whole
    with pytest.raises(ValueError, match="prefix"):
        RateLimitSettings(ipv4_prefix=33)
