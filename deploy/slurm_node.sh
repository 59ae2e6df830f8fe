#!/bin/bash
# Runs on each node of a job of deploy/slurm.sbatch: its part of Ray, with what Slurm gave the job there, until USR1.
set -euo pipefail -o monitor # what runs in the background is a process group

address=$(ip -4 route get "${HEAD%:*}" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
interface=$(ip -o -4 addr show | grep -F " $address/" | awk '{print $2; exit}')
port=$(find_port "$address")
cpus=$(env -u OMP_NUM_THREADS nproc) # those that Slurm binds the job to, where it does
folder=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
[ ${#folder} -le 24 ] || folder=/tmp # Ray keeps sockets in it, whose paths Linux bounds
if jobs=$(squeue --me --noheader --format=%A 2> /dev/null); then # else nobody knows which jobs there are
    for old in "$folder"/ray-*; do # of jobs to which a failure of this node left no time
        [[ ${old##*/} =~ ^ray-[0-9]+$ && -O $old && -f $old/start.log ]] || continue
        grep -qx "${old##*-}" <<< "$jobs" || rm -rf "$old"
    done
fi
folder=$folder/ray-$SLURM_JOB_ID
rm -rf "$folder" # of this job's start before
(umask 077 && mkdir "$folder") # without -p: one that is another user's is an error

role=(--address="$HEAD")
if [ "$SLURM_NODEID" = 0 ]; then
    role=(--head --port="${HEAD#*:}" --ray-client-server-port=$((port + 3)) --include-dashboard=false)
    trap 'kill -USR1 "$BATCH"' TERM # of a preemption Slurm tells these tasks, and not the batch script
else
    trap : TERM
fi
export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
export ORCHESTRATOR_CACHE="${ORCHESTRATOR_CACHE:-$folder/cache}" AUTOSCALER_METRIC_PORT=$((port + 9))
export DASHBOARD_METRIC_PORT=$((port + 10))
start() {
    sheltered -m ray.scripts.scripts start --block --disable-usage-stats \
        "${role[@]}" --node-ip-address="$address" \
        --num-cpus=$((cpus < SLURM_CPUS_ON_NODE ? cpus : SLURM_CPUS_ON_NODE)) --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
        --temp-dir="$folder" --object-store-memory=1000000000 --min-worker-port=0 --max-worker-port=0 \
        --node-manager-port=$((port + 1)) --object-manager-port=$((port + 2)) \
        --dashboard-agent-listen-port=$((port + 5)) --dashboard-agent-grpc-port=$((port + 6)) \
        --runtime-env-agent-port=$((port + 7)) --metrics-export-port=$((port + 8)) > "$folder/start.log" 2>&1
}
by_usr1=$((128 + $(kill -l USR1))) stopped='' # Ray's processes die of it
ray=''
trap 'stopped=1; kill -USR1 -- "-${ray:-0}" 2> /dev/null || true' USR1
for _ in 1 2 3 4; do # Ray gives itself 30 s to start, and a busy node or file system may need more
    start &
    ray=$! status=0
    while kill -0 "$ray" 2> /dev/null; do { wait "$ray" || status=$?; } 2> /dev/null; done
    kill -KILL -- "-$ray" 2> /dev/null || true # what is left of it has its ports
    [ "$status" != "$by_usr1" ] || stopped=1
    started=$(grep -c "Ray runtime started" "$folder/start.log" || true)
    if [ "$stopped" ] || [ "$started" != 0 ]; then break; fi
done
if [ ! "$stopped" ] || [ "$started" = 0 ]; then
    say "Ray did not stay on $SLURMD_NODENAME:" && tail -n 20 "$folder/start.log"
fi
for _ in $(seq 50); do # what is left of its processes ends meanwhile
    rm -rf "$folder" 2> /dev/null && break
    sleep 0.2
done
