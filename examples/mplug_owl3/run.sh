#!/usr/bin/env bash
# mPLUG-Owl3 from Qwen2, SigLIP, captions and conversations to a Hugging Face export.
#
#   examples/mplug_owl3/run.sh --llm DIR --tower DIR --pretrain-json FILE --pretrain-images DIR \
#       --interleaved-json FILE --interleaved-images DIR --sft-json FILE --sft-images DIR --output DIR \
#       [-- --parallel.tp 8 ...]
#
# --llm, --tower       Qwen/Qwen2-7B-Instruct and google/siglip-so400m-patch14-384
# --pretrain-json      captions in LLaVA's form, such as blip_laion_cc_sbu_558k.json; pictures under --pretrain-images
# --interleaved-json   conversations in LLaVA's form with several pictures (`image` a list) or a video (`video`)
# --sft-json           conversations in LLaVA's form, such as llava_v1_5_mix665k.json; pictures under --sft-images
# --output             folder for all that is made; the result is in its export/
# What follows -- goes to the three trainings. PROCESSES and NODES are those of examples/launch/torchrun.sh.
#
# Started again, it goes on where it stopped.
set -euo pipefail

source "$(dirname "$0")/../launch/steps.sh"

names="llm tower pretrain-json pretrain-images interleaved-json interleaved-images sft-json sft-images output"
declare -A given=()
read_given "$names" "$@"
check_given $names
size=$(
    "$python" -c 'import json, sys; c = json.load(open(sys.argv[1])); print(c.get("vision_config", c)["image_size"])' \
        "${given[tower]}/config.json"
)
recipe=examples/mplug_owl3/STAGE.py

preprocess mplug_owl3 pretrain --tile-size "$size" --template mplug_owl3_plain
preprocess mplug_owl3 interleaved --tile-size "$size" --cut single
preprocess mplug_owl3 sft --tile-size "$size" --cut single
join mplug_owl3
train pretrain pretrain start
train interleaved interleaved pretrain
train sft sft interleaved
export_hf sft export
