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

fail() {
    echo "error: $1" >&2
    exit 1
}

declare -A given=()
names="llm tower pretrain-json pretrain-images interleaved-json interleaved-images sft-json sft-images output"
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
for name in llm tower pretrain-images interleaved-images sft-images; do
    [[ -d ${given[$name]} ]] || fail "--$name ${given[$name]}: no such folder"
done
for name in pretrain-json interleaved-json sft-json; do
    [[ -f ${given[$name]} ]] || fail "--$name ${given[$name]}: no such file"
done
for name in $names; do
    given[$name]=$(realpath -m "${given[$name]}")
done
out=${given[output]}

cd "$(dirname "$0")/../.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

# Every command writes aside and renames at the end: what is there is whole.
size=$("$python" -c 'import json, sys; c = json.load(open(sys.argv[1])); print(c.get("vision_config", c)["image_size"])' \
    "${given[tower]}/config.json")
preprocess() { # STAGE [OPTION ...]
    [[ -e $out/data/$1.json ]] || "$python" data_tools/preprocess.py --family mplug_owl3 --tokenizer "${given[llm]}" \
        --input "${given[$1-json]}" --image-dir "${given[$1-images]}" --output "$out/data/$1" \
        --tile-size "$size" --workers "$(nproc)" "${@:2}"
}
train() { # STAGE START [OPTION ...]
    examples/launch/torchrun.sh "examples/mplug_owl3/$1.py" --model.pretrained "$2" --data.path "$out/data/$1" \
        --checkpoint.dir "$out/$1" "${@:3}"
}

preprocess pretrain --template mplug_owl3_plain
preprocess interleaved --cut single
preprocess sft --cut single
[[ -e $out/start ]] || "$python" tools/checkpoint/hf_to_megatron.py --llm "${given[llm]}" --tower "${given[tower]}" \
    --family mplug_owl3 --seed 42 --output "$out/start"
train pretrain "$out/start" "$@"
train interleaved "$out/pretrain" "$@"
train sft "$out/interleaved" "$@"
[[ -e $out/export ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$out/sft" --output "$out/export"
