"""Speaks SMTP with the gateway, for `helm test`: it greets, answers EHLO, and is no open relay. Sends no mail."""

import smtplib
import sys
import urllib.request

smtp, readyz, *rest = sys.argv[1:]
with urllib.request.urlopen(readyz, timeout=10) as answer:  # noqa: S310 - the chart's own address
    print("/readyz:", answer.status)
if rest:
    # This pod is no balancer: whether it may speak SMTP here depends on the trusted ranges.
    print("the Service expects PROXY headers: SMTP is not tried")
    sys.exit(0)
with smtplib.SMTP(smtp, local_hostname="test.invalid", timeout=30) as client:
    client.ehlo_or_helo_if_needed()
    print("EHLO:", sorted(client.esmtp_features))
    client.mail("")
    # RFC 6761 6.4: nobody's domain, so mail for it would be relayed mail
    code, text = client.rcpt("postmaster@mxgate-test.invalid")
    print("RCPT for a stranger's domain:", code, text.decode())
    sys.exit(0 if code >= 500 else "an open relay, or a gateway in trouble")
