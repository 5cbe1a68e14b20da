#!/usr/bin/env bash
# LLaVA-1.5 from Vicuna, CLIP and the published conversations to a Hugging Face export.
#
#   examples/llava15/run.sh --llm DIR --tower DIR --pretrain-json FILE --pretrain-images DIR \
#       --sft-json FILE --sft-images DIR --output DIR [--size 13b] [-- --parallel.tp 8 ...]
#
# --llm, --tower     lmsys/vicuna-7b-v1.5 (or 13b) and openai/clip-vit-large-patch14-336
# --pretrain-json    blip_laion_cc_sbu_558k.json, its pictures under --pretrain-images
# --sft-json         llava_v1_5_mix665k.json, its pictures under --sft-images
# --output           folder for all that is made; the result is in its export/
# --size             7b (default) or 13b
# What follows -- goes to both trainings. PROCESSES and NODES are those of examples/launch/torchrun.sh.
#
# Started again, it goes on where it stopped.
set -euo pipefail

source "$(dirname "$0")/../launch/steps.sh"

names="llm tower pretrain-json pretrain-images sft-json sft-images output size"
declare -A given=([size]=7b)
read_given "$names" "$@"
check_given $names
case ${given[size]} in
7b) suffix= ;;
13b) suffix=_13b ;;
*) fail "--size ${given[size]}: there are 7b and 13b" ;;
esac
recipe=examples/llava15/STAGE$suffix.py

preprocess llava pretrain --template plain
preprocess llava sft
join llava
train pretrain pretrain start
train sft sft pretrain
export_hf sft export
