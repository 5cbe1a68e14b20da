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

fail() {
    echo "error: $1" >&2
    exit 1
}

declare -A given=([image-size]=448)
names="llm tower pretrain-json pretrain-images sft-json sft-images output image-size"
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
for name in llm tower pretrain-json pretrain-images sft-json sft-images output; do
    given[$name]=$(realpath -m "${given[$name]}")
done
out=${given[output]}

cd "$(dirname "$0")/../.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

# Every command writes aside and renames at the end: what is there is whole.
preprocess() { # STAGE [OPTION ...]
    [[ -e $out/data/$1.json ]] || "$python" data_tools/preprocess.py --family mplug_owl2 --marker '<image>' \
        --tokenizer "${given[llm]}" --input "${given[$1-json]}" --image-dir "${given[$1-images]}" \
        --output "$out/data/$1" --workers "$(nproc)" "${@:2}"
}
train() { # STAGE START [OPTION ...]
    examples/launch/torchrun.sh "examples/mplug_owl2/$1.py" --model.pretrained "$2" --data.path "$out/data/$1" \
        --checkpoint.dir "$out/$1" "${@:3}"
}

preprocess pretrain --template plain
preprocess sft
[[ -e $out/start ]] || "$python" tools/checkpoint/hf_to_megatron.py --llm "${given[llm]}" --tower "${given[tower]}" \
    --family mplug_owl2 --seed 42 --output "$out/start"
train pretrain "$out/start" "$@"
[[ -e $out/pretrained-hf ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$out/pretrain" \
    --output "$out/pretrained-hf"
[[ -e $out/pretrained ]] || "$python" tools/checkpoint/hf_to_megatron.py --hf "$out/pretrained-hf" --family mplug_owl2 \
    --image-size "${given[image-size]}" --output "$out/pretrained"
train sft "$out/pretrained" "$@"
[[ -e $out/export ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$out/sft" --output "$out/export"
