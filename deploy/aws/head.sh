#!/usr/bin/env bash
# On the head of cluster.yaml, once Ray runs: MLflow and the nightly, both kept going by the user's crontab.
# Run again, it changes nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/aws/env.sh
. "$here/env.sh"
[ -n "$BUCKET" ] || { echo "deploy/aws/settings.env names no bucket: set BUCKET, then ray up again" >&2; exit 2; }

table=$(mktemp)
trap 'rm -f "$table"' EXIT
{
    crontab -l 2> /dev/null | grep -vF "$here/" || true
    echo "* * * * * bash $here/mlflow.sh"
    echo "17 * * * * bash $here/mlflow.sh save"
} > "$table"
crontab "$table"
python -m orchestrator.nightly "$NIGHTLY" --storage "$STORAGE" --tracking-uri "$MLFLOW" --install-cron > "$table"
crontab "$table"

setsid bash "$here/mlflow.sh" < /dev/null > /dev/null 2>&1 &  # not only at the next full minute
