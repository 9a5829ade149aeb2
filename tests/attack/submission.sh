#!/bin/bash
# Adapter of the attack lab: the submission listener of mxgate, behind front.py. It wraps the lab's own adapter.
#   LAB_ADAPTER  the lab's targets/mxgate.sh
#   FRONT_ROLE   stranger (default) or user: what the lab's clients are, see front.py
#   FRONT_PYTHON the interpreter of front.py (default: python3)
# The MX listener is on LISTEN_PORT + 10, submission on + 11 (STARTTLS) and + 12 (implicit TLS).
set -u
here=$(cd "$(dirname "$0")" && pwd)
FRONT_PID=$RUN_DIR/front.pid
port=$LISTEN_PORT
plain=$((port + 11)) implicit=$((port + 12))
export LISTEN_PORT=$((port + 10)) MXGATE_EXTRA_TOML=$RUN_DIR/submission.toml

alive() { [ -s "$FRONT_PID" ] && kill -0 "$(cat "$FRONT_PID")" 2>/dev/null; }

case $1 in
  caps) echo "sync size chunking managed$([ "${FRONT_ROLE:-stranger}" = stranger ] && echo ' starttls')"; exit ;;
  start)
    mkdir -p "$RUN_DIR"
    cat > "$MXGATE_EXTRA_TOML" <<X
relay.routes = [{ domains = ["*"], downstream = ["$SINK_HOST:$SINK_PORT"] }, { name = "submission", domains = [], downstream = ["$SINK_HOST:$SINK_PORT"] }]
submission.listen = ["127.0.0.1:$plain"]
submission.listen_tls = ["127.0.0.1:$implicit"]
submission.route = "submission"
submission.max_connections_per_client = 1000
submission.auth.address = "unix:$RUN_DIR/auth"
submission.policy.sender_login.mode = "off"
X
    "$LAB_ADAPTER" start
    alive || { rm -f "$RUN_DIR/auth"
      setsid "${FRONT_PYTHON:-python3}" "$here/front.py" "${FRONT_ROLE:-stranger}" "$port" "$plain" "$implicit" "$RUN_DIR/auth" \
        >> "$RUN_DIR/front.log" 2>&1 < /dev/null &
      echo $! > "$FRONT_PID"; }
    ;;
  stop)
    alive && kill "$(cat "$FRONT_PID")"
    rm -f "$FRONT_PID"
    "$LAB_ADAPTER" stop ;;
  *) "$LAB_ADAPTER" "$1" ;;
esac
