#!/usr/bin/env bash
# Installs the project on a node of cluster.yaml, at the versions of requirements.lock. Run again, it brings up to date.
# torch comes as PyPI has it for Linux: with CUDA, and the NVIDIA libraries that this very version asks for.
set -euo pipefail
cd "$(dirname "$0")/../.."
python3 -c 'import ensurepip' 2> /dev/null || {
    sudo apt-get -o DPkg::Lock::Timeout=300 -q update
    sudo apt-get -o DPkg::Lock::Timeout=300 -q -y install python3-venv
}
[ -d ~/venv ] || python3 -m venv ~/venv
~/venv/bin/python -m pip install --quiet --constraint requirements.lock --editable '.[cluster,inception]'
line=". $PWD/deploy/aws/env.sh"
grep -qxF "$line" ~/.bashrc 2> /dev/null || echo "$line" >> ~/.bashrc
