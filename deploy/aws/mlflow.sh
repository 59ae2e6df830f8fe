#!/usr/bin/env bash
# MLflow's server on the head, for cron to call every minute: while it runs, a further call ends at once.
# `mlflow.sh save` copies its database to the bucket; a head without one begins with that copy.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/aws/env.sh
. "$here/env.sh"
mkdir -p ~/mlflow
if [ "${1:-}" = save ]; then
    exec python "$here/mlflow_copy.py" save "$MLFLOW_BACKEND" "s3://$BUCKET"
fi
exec 9> ~/mlflow/lock
flock -n 9 || exit 0
python "$here/mlflow_copy.py" restore "$MLFLOW_BACKEND" "s3://$BUCKET" >> ~/mlflow/server.log 2>&1
# Without job runners and with one worker it takes 0.4 GB instead of 2; at 127.0.0.1 only who is on the head gets in.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
exec mlflow server --host 127.0.0.1 --port "${MLFLOW##*:}" --workers 1 --backend-store-uri "$MLFLOW_BACKEND" \
    --artifacts-destination "s3://$BUCKET/mlflow" >> ~/mlflow/server.log 2>&1
