#!/bin/bash
# Several nodes without a scheduler. On each node:
#   NODES=2 NODE_RANK=0 GPUS=8 MASTER_ADDR=node-0 bash docs/torchrun.sh --config intuitor
# Tested with two "nodes" of one CPU process each on one machine (tests/test_multinode.py); NEVER RUN ON A CLUSTER.
set -euo pipefail
: "${NODES:?how many nodes}" "${NODE_RANK:?which of them this is, from 0}" "${GPUS:?GPUs of each}"
: "${MASTER_ADDR:?a name of node 0 that the others can reach}"

# runs/ must be on a file system that all nodes see: node 0 writes it, and all read checkpoints from it.
exec python -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
    --no-python rlif fit \
    --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.strategy "${STRATEGY:-fsdp2}" "$@"
