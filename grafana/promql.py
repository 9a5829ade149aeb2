"""The few forms of PromQL that the pages use. `$F` stands for the selection of jobs and instances (model.FILTER)."""

from __future__ import annotations

from grafana.model import Query

INTERVAL = "$__rate_interval"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, added up by these labels."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{_chosen(where)}[{INTERVAL}]))"


def total(metric: str, by: str = "", where: str = "") -> str:
    """A gauge, added up by these labels."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({metric}{_chosen(where)})"


def share(metric: str, part: str, of: str = "") -> str:
    """What part of a rate `part` is, 0 to 1; 0 where there is none of it."""
    return f"({or_zero(rate(metric, where=_both(of, part)))}) / {rate(metric, where=of)}"


def top10(metric: str, by: str, where: str = "") -> str:
    """The ten largest rates."""
    return f"topk(10, {rate(metric, by, where)} > 0)"


def or_zero(expr: str) -> str:
    """An expression without labels, 0 where it has no value: a counter that did not begin to count."""
    return f"{expr} or vector(0)"


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    """Of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, {rate(f'{metric}_bucket', labels, where)})"


def quantiles(metric: str, where: str = "") -> tuple[Query, ...]:
    """Median, 95 % and 99 %, with the transactions that are examples of them."""
    return tuple(
        Query(quantile(q, metric, where=where), name, exemplar=True)
        for q, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
    )


def mean(metric: str, by: str = "", where: str = "") -> str:
    """The mean of what a histogram saw."""
    return f"{rate(f'{metric}_sum', by, where)} / {rate(f'{metric}_count', by, where)}"


def _both(one: str, other: str) -> str:
    return ",".join(filter(None, (one, other)))


def _chosen(where: str) -> str:
    return f"{{{_both('$F', where)}}}"
