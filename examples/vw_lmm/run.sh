#!/usr/bin/env bash
# VW-LMM from Vicuna or Mistral, CLIP and conversations to an export that the authors' loader reads.
#
#   examples/vw_lmm/run.sh --llm DIR --tower DIR --pretrain-json FILE --pretrain-images DIR \
#       --sft-json FILE --sft-images DIR --output DIR [--variant pif] [--template mistral] [-- --parallel.tp 8 ...]
#
# --llm, --tower     lmsys/vicuna-7b-v1.5 or mistralai/Mistral-7B-Instruct-v0.2, and openai/clip-vit-large-patch14-336
# --pretrain-json    blip_laion_cc_sbu_558k.json, its pictures under --pretrain-images
# --sft-json         llava_v1_5_mix665k.json, its pictures under --sft-images
# --output           folder for all that is made; the result is in its export/
# --variant          vw (default), or pif: the last stage with pseudo image features
# --template         v1 (default, Vicuna) or mistral
# What follows -- goes to all trainings. PROCESSES and NODES are those of examples/launch/torchrun.sh.
#
# Started again, it goes on where it stopped.
set -euo pipefail

source "$(dirname "$0")/../launch/steps.sh"

names="llm tower pretrain-json pretrain-images sft-json sft-images output variant template"
declare -A given=([variant]=vw [template]=v1)
read_given "$names" "$@"
check_given $names
case ${given[variant]} in
vw | pif) ;;
*) fail "--variant ${given[variant]}: there are vw and pif" ;;
esac
case ${given[template]} in
v1 | mistral) ;;
*) fail "--template ${given[template]}: there are v1 and mistral" ;;
esac
recipe=examples/vw_lmm/STAGE.py

preprocess vw_lmm pretrain --template plain
preprocess vw_lmm sft --template "${given[template]}"
join vw_lmm
train pretrain pretrain start
train sft sft pretrain
train words sft sft
if [[ ${given[variant]} == vw ]]; then
    train joint sft words
    export_hf joint export --dialect original
else
    # The two families have the same weights, and nothing in them tells one from the other: it is named.
    given+=([sft_pif-json]=${given[sft-json]} [sft_pif-images]=${given[sft-images]})
    preprocess vw_lmm_pif sft_pif --template "${given[template]}"
    export_hf words words_hf --dialect original
    [[ -e $out/start_pif ]] || "$python" tools/checkpoint/hf_to_megatron.py --hf "$out/words_hf" \
        --tower "$out/words_hf/vision_tower" --family vw_lmm_pif --output "$out/start_pif"
    train joint_pif sft_pif start_pif
    export_hf joint_pif export --dialect original
fi
