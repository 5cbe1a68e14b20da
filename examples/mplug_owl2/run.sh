#!/usr/bin/env bash
# mPLUG-Owl2 from Llama 2, CLIP, captions and conversations to a Hugging Face export.
#
#   examples/mplug_owl2/run.sh --llm DIR --tower DIR --pretrain-json FILE --pretrain-images DIR \
#       --sft-json FILE --sft-images DIR --output DIR [--image-size 448] [-- --parallel.tp 8 ...]
#
# --llm, --tower     meta-llama/Llama-2-7b-hf and openai/clip-vit-large-patch14
# --pretrain-json    captions in LLaVA's form, such as blip_laion_cc_sbu_558k.json; pictures under --pretrain-images
# --sft-json         conversations in LLaVA's form, such as llava_v1_5_mix665k.json; pictures under --sft-images
# --output           folder for all that is made; the result is in its export/
# --image-size       side of the pictures of the second stage, in pixels; those of the first are the tower's
# What follows -- goes to both trainings. PROCESSES and NODES are those of examples/launch/torchrun.sh.
#
# Started again, it goes on where it stopped.
set -euo pipefail

source "$(dirname "$0")/../launch/steps.sh"

names="llm tower pretrain-json pretrain-images sft-json sft-images output image-size"
declare -A given=([image-size]=448)
read_given "$names" "$@"
check_given $names
recipe=examples/mplug_owl2/STAGE.py

preprocess mplug_owl2 pretrain --template plain
preprocess mplug_owl2 sft
join mplug_owl2
train pretrain pretrain start
export_hf pretrain pretrained-hf
[[ -e $out/pretrained ]] || "$python" tools/checkpoint/hf_to_megatron.py --hf "$out/pretrained-hf" --family mplug_owl2 \
    --image-size "${given[image-size]}" --output "$out/pretrained"
train sft sft pretrained
export_hf sft export
