# Starts MLflow on the head, for the head alone: http://127.0.0.1:5000. It outlives `ray down`; nothing where it runs.
# By default it would be a dozen processes (2 GB): one worker and no job runners are 0.4 GB.
folder="$HOME/mlflow"
answers() { python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health')" 2>/dev/null; }
answers && exit 0
mkdir -p "$folder"
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true setsid nohup mlflow server \
    --host 127.0.0.1 --port 5000 --workers 1 --backend-store-uri "sqlite:///$folder/mlflow.db" \
    --artifacts-destination "$folder/artifacts" >"$folder/server.log" 2>&1 </dev/null &
for _ in $(seq 60); do
    answers && exit 0
    sleep 1
done
echo "MLflow does not answer; see $folder/server.log on the head" >&2
exit 1
