"""Dashboards, rules and their tests, and docs/metrics.md: all of them made from code, by `python -m grafana`.

    catalogue   every metric that the gateway has, asked of a gateway that is put together and drained at once
    document    docs/metrics.md                    model    panels and dashboards as Grafana reads them
    pages/      the dashboards, one file each      rules    recording rules and alerts    promtool   their unit tests

Nothing here is part of the installed program. tests/grafana says when a generated file is not what the code makes.
"""
