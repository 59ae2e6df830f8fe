# Read by every shell that `ray up` and `ray down` open on a node of deploy/onprem.yaml.
export PATH="$HOME/diffusion-orchestrator/.venv/bin:$PATH"  # `ray` is called by its bare name
export RAY_AUTH_MODE=token                                  # head, workers and clients: all or nothing
# The address that this shell was reached at, and the interface that has it: Ray's own guess asks the internet, and
# gloo's (data-parallel training on CPUs) may be the loopback.
if [ -n "${SSH_CONNECTION:-}" ]; then
    NODE_ADDRESS=$(echo "$SSH_CONNECTION" | cut -d' ' -f3)
    GLOO_SOCKET_IFNAME=$(ip -o -4 addr show | awk -v address="$NODE_ADDRESS/" 'index($4, address) == 1 {print $2}')
    export NODE_ADDRESS GLOO_SOCKET_IFNAME
fi
