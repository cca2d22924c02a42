#!/usr/bin/env bash
# Seconds from a fresh clone to the first answered chat: git clone, `make serve`, one question over HTTP.
#
#     benchmarks/first_chat.sh            # of this checkout's last commit, in a scratch directory
#
# Packages come from pip's cache if they were installed before, else from the network.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
port="${PORT:-8765}"
server=""
url="http://127.0.0.1:$port"
body='{"messages": [{"role": "user", "content": "Who are you?"}], "adapter": "lumi", "temperature": 0}'

stop() {
  [ -z "$server" ] || kill -- -"$server" 2>/dev/null || true
  rm -rf "$scratch"
}
trap stop EXIT

started=$(date +%s.%N)
git clone --quiet "$checkout" "$scratch/loraserve"
setsid make -C "$scratch/loraserve" serve ARGS="--port $port" >"$scratch/log" 2>&1 &
server=$!
until answer="$(curl --silent --fail "$url/v1/chat/completions" -H 'Content-Type: application/json' -d "$body")"; do
  kill -0 "$server" 2>/dev/null || { cat "$scratch/log"; exit 1; }
  sleep 0.1
done
ended=$(date +%s.%N)

python3 - "$answer" "$started" "$ended" <<'PY'
import json, sys

answer, started, ended = sys.argv[1:]
print(json.loads(answer)["choices"][0]["message"]["content"])
print(f"{float(ended) - float(started):.0f} s from `git clone` to the answer")
PY
