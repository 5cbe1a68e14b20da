#!/usr/bin/env bash
# Imp from a decoder, SigLIP and the published conversations to a Hugging Face export.
#
#   examples/imp/run.sh --llm DIR --tower DIR --pretrain-json FILE --pretrain-images DIR \
#       --sft-json FILE --sft-images DIR --output DIR [--model qwen1_5] [-- --parallel.tp 8 ...]
#
# --llm, --tower     microsoft/phi-2, Qwen/Qwen1.5-1.8B-Chat or microsoft/Phi-3-mini-4k-instruct, and
#                    google/siglip-so400m-patch14-384
# --pretrain-json    blip_laion_cc_sbu_558k.json, its pictures under --pretrain-images
# --sft-json         llava_v1_5_mix665k.json, its pictures under --sft-images
# --output           folder for all that is made; the result is in its export/
# --model            phi2 (default), qwen1_5 or phi3
# What follows -- goes to both trainings. PROCESSES and NODES are those of examples/launch/torchrun.sh.
#
# Started again, it goes on where it stopped.
set -euo pipefail

source "$(dirname "$0")/../launch/steps.sh"

names="llm tower pretrain-json pretrain-images sft-json sft-images output model"
declare -A given=([model]=phi2)
read_given "$names" "$@"
check_given $names
case ${given[model]} in
phi2) suffix= template=phi2 ;;
qwen1_5) suffix=_qwen1_5 template=qwen2 ;;
phi3) suffix=_phi3 template=phi3 ;;
*) fail "--model ${given[model]}: there are phi2, qwen1_5 and phi3" ;;
esac
recipe=examples/imp/STAGE$suffix.py

if [[ ${given[model]} == phi2 ]]; then
    [[ -e $out/llm ]] || "$python" examples/imp/add_end_token.py "${given[llm]}" "$out/llm"
    given[llm]=$out/llm
fi
preprocess imp pretrain --template plain
preprocess imp sft --template "$template"
join imp
train pretrain pretrain start
train sft sft pretrain
export_hf sft export
