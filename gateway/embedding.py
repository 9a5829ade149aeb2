"""The gatekeeper of a configuration without a listener: for a program that receives mail by itself.

    async with open_gatekeeper(load(Path("mxgate.toml"), environ=os.environ)) as gatekeeper:
        handler = GatewayHandler(gatekeeper)            # gateway.adapters.aiosmtpd_handler

Policies, relay, DNS and store are those of the configuration, in one process and one loop; [server] counts only for
what the gatekeeper looks at (host name, sizes, hops). There are no workers, no admin port and no drain of sessions:
those are the program's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from gateway import plugins
from gateway.adapters import memory
from gateway.adapters.dns import Dns
from gateway.adapters.metrics import ProcessMetrics
from gateway.adapters.relay import SmtpRelay
from gateway.app import (
    SystemClock,
    dns_settings,
    gatekeeper_settings,
    id_source,
    log_of,
    lost_lines,
    relay_settings,
    steps_of,
)
from gateway.decision import DecisionRing
from gateway.gatekeeper import Gatekeeper
from gateway.mail.body import Spool
from gateway.open_http import WorkerHttp
from gateway.open_store import WorkerStore
from gateway.pipeline import Pipeline
from gateway.services import Instruments, Services

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.services import Log


@asynccontextmanager
async def open_gatekeeper(
    config: Config, *, metrics: ProcessMetrics | None = None, log: Log | None = None
) -> AsyncIterator[Gatekeeper]:
    """Everything is started when it is entered and stopped when it is left. Needs a running loop.

    `metrics` counts, and its `snapshot()` can be rendered by adapters.metrics.MergedMetrics; `log` is [log] unless
    given. Raises what a start raises: ConfigError, StartError, and the errors of store and policies.
    """
    metrics = metrics or ProcessMetrics()
    log = log or log_of(config, on_loss=lost_lines(metrics).inc)
    instruments = Instruments(SystemClock(), log, metrics)
    planned = plugins.plan(config)
    async with AsyncExitStack() as stack:
        dns = Dns(dns_settings(config), instruments)
        stack.push_async_callback(dns.close)
        store = WorkerStore(config.state, [each.policy for each in planned], instruments)
        await store.start()
        stack.push_async_callback(store.close)
        services = Services(instruments.clock, instruments.log, instruments.metrics, dns)
        http = WorkerHttp([each.policy for each in planned], instruments)
        stack.push_async_callback(http.close)
        steps = steps_of(planned, services, dns, store, http)
        pipeline = Pipeline(steps, services, reserved=frozenset([config.quarantine.header.lower()]))
        await pipeline.start()
        stack.push_async_callback(pipeline.stop)
        relay = SmtpRelay(
            relay_settings(config), clock=services.clock, log=services.log, metrics=services.metrics
        )
        await relay.start()
        stack.push_async_callback(relay.close)
        server = config.server
        spool = Spool(
            str(server.spool_dir or ""),
            memory_bytes=server.spool_memory_bytes,
            total_bytes=server.spool_memory_total_bytes,
            release=memory.release,
        )
        settings = gatekeeper_settings(config)
        yield Gatekeeper(settings, pipeline, relay, spool, services, id_source(), DecisionRing())
