"""The dashboards, one file each."""

from grafana.model import Dashboard
from grafana.pages.authentication import AUTHENTICATION
from grafana.pages.dns_and_store import DNS_AND_STORE
from grafana.pages.downstream import DOWNSTREAM
from grafana.pages.overview import OVERVIEW
from grafana.pages.policies import POLICIES
from grafana.pages.process import PROCESS
from grafana.pages.smtp import SMTP

DASHBOARDS: tuple[Dashboard, ...] = (
    OVERVIEW,
    SMTP,
    AUTHENTICATION,
    POLICIES,
    DNS_AND_STORE,
    DOWNSTREAM,
    PROCESS,
)
