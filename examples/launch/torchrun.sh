#!/usr/bin/env bash
# Train on this machine, or, run once per machine, on several.
#
#   examples/launch/torchrun.sh RECIPE.py [--parallel.tp 2 ...]
#
# PROCESSES     ranks on this machine; default: one per GPU, or 1 without a GPU
# NODES         machines, default 1; on more than one also:
# NODE_RANK     number of this machine, from 0
# MASTER        host[:port] of machine 0, port 29500 by default
set -euo pipefail
cd "$(dirname "$0")/../.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
nodes=${NODES:-1}
if ((nodes > 1)); then
    : "${NODE_RANK:?set it to the number of this machine, from 0}" "${MASTER:?set it to host[:port] of machine 0}"
    [[ $MASTER == *:* ]] || MASTER=$MASTER:29500
    rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}")
else
    rendezvous=(--standalone)
fi
# Ranks that share a machine's cores must not each start a thread per core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
exec "$python" examples/launch/torchrun.py --nproc-per-node "$processes" "${rendezvous[@]}" -m megamm.train "$@"
