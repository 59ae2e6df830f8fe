# shellcheck shell=bash
# The environment of every node of cluster.yaml: of Ray's processes, of a person's shell and of cron's commands.
export PATH="$HOME/venv/bin:$PATH"
export RAY_AUTH_MODE=token           # the token itself is in ~/.ray/auth_token
export RAY_USAGE_STATS_ENABLED=0
export PYTHONPYCACHEPREFIX="$HOME/.cache/pycache"  # no files among the code, which Ray compares and copies
# shellcheck source=deploy/aws/settings.env
. "$(dirname "${BASH_SOURCE[0]}")/settings.env"
export STORAGE="s3://$BUCKET/runs"
export MLFLOW="http://127.0.0.1:5000"
