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

fail() {
    echo "error: $1" >&2
    exit 1
}

declare -A given=([variant]=vw [template]=v1)
names="llm tower pretrain-json pretrain-images sft-json sft-images output variant template"
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 == --* && " $names " == *" ${1#--} "* ]] || fail "$1: no such option; there are --${names// / --}"
    (($# > 1)) || fail "$1: what it stands for is missing"
    given[${1#--}]=$2
    shift 2
done
(($#)) && shift # the --
for name in $names; do
    [[ -n ${given[$name]:-} ]] || fail "--$name is missing; see the head of $0"
done
for name in llm tower pretrain-images sft-images; do
    [[ -d ${given[$name]} ]] || fail "--$name ${given[$name]}: no such folder"
done
for name in pretrain-json sft-json; do
    [[ -f ${given[$name]} ]] || fail "--$name ${given[$name]}: no such file"
done
case ${given[variant]} in
vw | pif) ;;
*) fail "--variant ${given[variant]}: there are vw and pif" ;;
esac
case ${given[template]} in
v1 | mistral) ;;
*) fail "--template ${given[template]}: there are v1 and mistral" ;;
esac
for name in llm tower pretrain-json pretrain-images sft-json sft-images output; do
    given[$name]=$(realpath -m "${given[$name]}")
done
out=${given[output]}

cd "$(dirname "$0")/../.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

# Every command writes aside and renames at the end: what is there is whole.
preprocess() { # FAMILY STAGE NAME TEMPLATE
    [[ -e $out/data/$3.json ]] || "$python" data_tools/preprocess.py --family "$1" --template "$4" \
        --tokenizer "${given[llm]}" --input "${given[$2-json]}" --image-dir "${given[$2-images]}" \
        --output "$out/data/$3" --workers "$(nproc)"
}
train() { # RECIPE START DATA [OPTION ...]
    examples/launch/torchrun.sh "examples/vw_lmm/$1.py" --model.pretrained "$2" --data.path "$out/data/$3" \
        --checkpoint.dir "$out/$1" "${@:4}"
}
convert() { # CHECKPOINT OUTPUT
    [[ -e $2 ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$1" --output "$2" --dialect original
}

preprocess vw_lmm pretrain pretrain plain
preprocess vw_lmm sft sft "${given[template]}"
[[ -e $out/start ]] || "$python" tools/checkpoint/hf_to_megatron.py --llm "${given[llm]}" --tower "${given[tower]}" \
    --family vw_lmm --seed 42 --output "$out/start"
train pretrain "$out/start" pretrain "$@"
train sft "$out/pretrain" sft "$@"
train words "$out/sft" sft "$@"
if [[ ${given[variant]} == vw ]]; then
    train joint "$out/words" sft "$@"
    convert "$out/joint" "$out/export"
else
    # The two families have the same weights, and nothing in them tells one from the other: it is named.
    preprocess vw_lmm_pif sft sft_pif "${given[template]}"
    convert "$out/words" "$out/words_hf"
    [[ -e $out/start_pif ]] || "$python" tools/checkpoint/hf_to_megatron.py --hf "$out/words_hf" \
        --tower "$out/words_hf/vision_tower" --family vw_lmm_pif --output "$out/start_pif"
    train joint_pif "$out/start_pif" sft_pif "$@"
    convert "$out/joint_pif" "$out/export"
fi
