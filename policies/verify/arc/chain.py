"""Validation of a chain of ARC sets (RFC 8617 5.2): what there is to ask at the header, and the judgement at EOM.

`prepare` reads the fields, has the digests of the body computed and knows every question; `validate` asks them at once
and judges. The newest AMS and every seal have to verify; how far back older AMSs do is `oldest_pass`.

Bounds: 50 sets, MAX_KEYS names asked, two digests of the body, and each field is put into a canonical form once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from gateway.api import Answer, BodyDigests, Canonicalization, Header, Lookup, Question, Result
from policies.verify.arc.sets import ArcSet, ChainError, read_sets
from policies.verify.canonical import canonical_header
from policies.verify.signed import (
    PASS,
    Coverage,
    Finding,
    SignatureError,
    Signer,
    Step,
    canonical_unsigned,
    header_digest,
    judge_time,
    parse_coverage,
    parse_signer,
    prove,
    signed_fields,
)
from policies.verify.tags import Tags

# Ours. RFC 8617 allows 50 sets and says nothing of look-ups; this is ten hops that seal and sign with a key each.
# A chain of one hop after the other within few operators has few names, however many sets there are.
MAX_KEYS = 20
_DEFAULT_C = b"relaxed/relaxed"


@dataclass(frozen=True, slots=True)
class SignedMessage:
    """What an AMS says: who signed the message as the sealer sent it, and what of it."""

    signer: Signer
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Link:
    """A set as far as it can be understood without keys; an older AMS may be beyond that."""

    arc_set: ArcSet
    sealer: Signer
    message: SignedMessage | SignatureError


@dataclass(frozen=True, slots=True)
class Chain:
    """What a header says: the sets from the oldest to the newest, or at once why the chain fails (`fault`)."""

    links: tuple[Link, ...] = ()
    questions: tuple[Question, ...] = ()
    fault: str = ""


class Judged(NamedTuple):
    """One set of a chain and what came of its signatures; None for one that was not reached."""

    link: Link
    seal: Finding | None = None
    ams: Finding | None = None


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The Chain Validation Status: none, pass, fail, or temperror when a key could not be looked up for now.

    `sets` are from the newest to the oldest, () where the fields are no chain. `oldest_pass` is the oldest AMS that
    verifies, 0 when all do (RFC 8617 5.2 step 5); None but for a pass.
    """

    result: Result
    reason: str = ""
    sets: tuple[Judged, ...] = ()
    oldest_pass: int | None = None


def prepare(header: Header, digests: BodyDigests, *, utf8: bool = False) -> Chain | None:
    """The chain of a message whose header is complete, None when it has no ARC field; for `on_header`."""
    try:
        sets = read_sets(header, utf8=utf8)
        if not sets:
            return None
        links = tuple([_link(each) for each in sets])
        questions = _questions(links)
    except ChainError as exc:
        return Chain(fault=str(exc))
    for link in links:
        if isinstance(link.message, SignedMessage):
            # l= is judged by the length of the whole body, so no two sets want more than two digests
            digests.want(link.message.coverage.body_mode)
    return Chain(links, questions)


def validate(chain: Chain | None, header: Header, digests: BodyDigests, *, now: float) -> Lookup[ChainResult]:
    """The status of a chain; at EOM. `now` in seconds since the epoch. Asks `chain.questions`, all at once."""
    if chain is None:
        return ChainResult(Result.NONE)
    if chain.fault:
        return ChainResult(Result.FAIL, chain.fault)
    judge = _Judge(header, digests, now)
    older, newest = chain.links[:-1], chain.links[-1]
    # RFC 8617 5.2 step 4. What no key can mend needs none.
    content = judge.content(newest)
    if content.result is not Result.PASS:
        return _failed(chain, [Judged(newest, ams=content)])
    keys = dict(zip(chain.questions, (yield chain.questions), strict=True))
    judged = [Judged(newest, ams=judge.ams(newest, keys))]
    if _is_failure(judged[0].ams):
        return _failed(chain, judged)
    # RFC 8617 5.2 step 6, before step 5: what is optional is done for chains that pass
    for link, digest in zip(reversed(chain.links), reversed(_seal_digests(chain.links)), strict=True):
        if link is not newest:
            judged.append(Judged(link))
        judged[-1] = judged[-1]._replace(seal=prove(link.sealer, digest, keys[link.sealer.question]).finding)
        if _is_failure(judged[-1].seal):
            return _failed(chain, judged)
    if waiting := [text for each in judged if (text := _words(each, Result.TEMPERROR))]:
        return ChainResult(Result.TEMPERROR, waiting[0], tuple(judged))
    oldest_pass = 0
    for at, link in enumerate(reversed(older), 1):
        finding = judge.ams(link, keys)
        judged[at] = judged[at]._replace(ams=finding)
        if finding.result is not Result.PASS:
            oldest_pass = link.arc_set.instance + 1
            break
    return ChainResult(Result.PASS, sets=tuple(judged), oldest_pass=oldest_pass)


def _link(arc_set: ArcSet) -> Link:
    try:
        sealer = parse_signer(arc_set.seal_tags)
    except SignatureError as exc:
        raise ChainError(f"ARC-Seal {arc_set.instance}: {exc.reason}") from exc
    try:
        return Link(arc_set, sealer, _signed_message(arc_set.ams_tags))
    except SignatureError as exc:
        return Link(arc_set, sealer, exc)


def _signed_message(tags: Tags) -> SignedMessage:
    # RFC 8617 4.1.2 leaves the default of c= to DKIM, where it is simple/simple; the published suite and the verifiers
    # in use take relaxed/relaxed, as its drafts had it, and sealers that leave c= out mean that
    message = SignedMessage(parse_signer(tags), parse_coverage({"c": _DEFAULT_C, **tags}))
    # RFC 8617 4.1.2 wants no ARC field in h=. Sealers that list their AAR are too many to refuse, and do no harm; a
    # seal is made behind its AMS, so that it can be of no set but an older one.
    if b"arc-seal" in message.coverage.names:
        raise SignatureError("h= lists ARC-Seal")
    return message


def _questions(links: Sequence[Link]) -> tuple[Question, ...]:
    """The names of all keys that the status needs, and of those for `oldest_pass` while there is room."""
    newest = links[-1]
    if isinstance(newest.message, SignatureError):
        raise ChainError(f"ARC-Message-Signature {newest.arc_set.instance}: {newest.message.reason}")
    asked = dict.fromkeys([newest.message.signer.question, *(link.sealer.question for link in links)])
    if len(asked) > MAX_KEYS:
        raise ChainError(f"there are more than {MAX_KEYS} keys to look up")
    for link in reversed(links):
        if isinstance(link.message, SignedMessage) and len(asked) < MAX_KEYS:
            asked.setdefault(link.message.signer.question)
    return tuple(asked)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Judges what the AMSs of one message sign, which are nearly the same fields each time."""

    header: Header
    digests: BodyDigests
    now: float
    canonical: Callable[[bytes, Canonicalization], bytes] = field(
        default_factory=lambda: cache(canonical_header)
    )

    def content(self, link: Link) -> Finding:
        """What can be said of an AMS without a key."""
        if isinstance(link.message, SignatureError):
            return Finding(link.message.result, Step.SIGNATURE, link.message.reason)
        coverage = link.message.coverage
        time = judge_time(coverage, self.now)
        if time is not PASS:
            return time
        body = self.digests.get(coverage.body_mode)
        # what stands behind l= the signer has not seen
        if coverage.body_length is not None and coverage.body_length != body.size_bytes:
            return Finding(Result.POLICY, Step.COVERAGE, "l= is not the length of the body")
        if body.sha256 != coverage.body_hash:
            return Finding(Result.FAIL, Step.BODY, "body hash did not verify")
        return PASS

    def ams(self, link: Link, keys: Mapping[Question, Answer]) -> Finding:
        """Whether an AMS verifies."""
        content = self.content(link)
        if content.result is not Result.PASS or isinstance(link.message, SignatureError):
            return content
        signer, coverage = link.message.signer, link.message.coverage
        if signer.question not in keys:
            return Finding(Result.NEUTRAL, Step.KEY, "there are too many keys to look up")
        own = link.arc_set.ams
        fields = signed_fields(self.header, coverage.names, own)
        digest = header_digest(fields, own, coverage.header_mode, canonical=self.canonical)
        return prove(signer, digest, keys[signer.question]).finding


def _seal_digests(links: Sequence[Link]) -> list[bytes]:
    """SHA-256 of what each seal signs: the fields of its set and of all sets before it (RFC 8617 5.1.1)."""
    before = hashlib.sha256()
    digests = []
    for link in links:
        arc_set = link.arc_set
        for part in (arc_set.aar, arc_set.ams):
            before.update(canonical_header(part.raw, Canonicalization.RELAXED))
        with_own = before.copy()
        # RFC 8617 4.1.3: only "relaxed" header field canonicalization is used
        with_own.update(canonical_unsigned(arc_set.seal, Canonicalization.RELAXED))
        digests.append(with_own.digest())
        before.update(canonical_header(arc_set.seal.raw, Canonicalization.RELAXED))
    return digests


def _failed(chain: Chain, judged: Sequence[Judged]) -> ChainResult:
    """The failure of the last of the judged sets; the older ones were not reached."""
    unreached = [Judged(link) for link in reversed(chain.links[: len(chain.links) - len(judged)])]
    return ChainResult(Result.FAIL, _words(judged[-1]), (*judged, *unreached))


def _is_failure(finding: Finding | None) -> bool:
    """Whether it is final; a key that cannot be looked up for now is not."""
    return finding is not None and finding.result not in (Result.PASS, Result.TEMPERROR)


def _words(judged: Judged, only: Result | None = None) -> str:
    """Which signature of a set did not pass, and why; "" when none."""
    instance = judged.link.arc_set.instance
    for name, finding in (("ARC-Message-Signature", judged.ams), ("ARC-Seal", judged.seal)):
        if finding is not None and finding.result is not Result.PASS and only in (None, finding.result):
            return f"{name} {instance}: {finding.reason}"
    return ""
