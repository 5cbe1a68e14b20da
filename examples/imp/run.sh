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

fail() {
    echo "error: $1" >&2
    exit 1
}

declare -A given=([model]=phi2)
names="llm tower pretrain-json pretrain-images sft-json sft-images output model"
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
case ${given[model]} in
phi2) suffix= ;;
qwen1_5 | phi3) suffix=_${given[model]} ;;
*) fail "--model ${given[model]}: there are phi2, qwen1_5 and phi3" ;;
esac
for name in llm tower pretrain-json pretrain-images sft-json sft-images output; do
    given[$name]=$(realpath -m "${given[$name]}")
done
out=${given[output]}

cd "$(dirname "$0")/../.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python

# Every command writes aside and renames at the end: what is there is whole.
preprocess() { # STAGE [OPTION ...]
    [[ -e $out/data/$1.json ]] || "$python" data_tools/preprocess.py --family imp --tokenizer "$llm" \
        --input "${given[$1-json]}" --image-dir "${given[$1-images]}" --output "$out/data/$1" --workers "$(nproc)" "${@:2}"
}
train() { # STAGE START [OPTION ...]
    examples/launch/torchrun.sh "examples/imp/$1$suffix.py" --model.pretrained "$2" --data.path "$out/data/$1" \
        --checkpoint.dir "$out/$1" "${@:3}"
}

llm=${given[llm]}
template=phi2
if [[ ${given[model]} == phi2 ]]; then
    llm=$out/llm
    [[ -e $llm ]] || "$python" examples/imp/add_end_token.py "${given[llm]}" "$llm"
elif [[ ${given[model]} == qwen1_5 ]]; then
    template=qwen2
else
    template=phi3
fi
preprocess pretrain --template plain
preprocess sft --template "$template"
[[ -e $out/start ]] || "$python" tools/checkpoint/hf_to_megatron.py --llm "$llm" --tower "${given[tower]}" \
    --family imp --seed 42 --output "$out/start"
train pretrain "$out/start" "$@"
train sft "$out/pretrain" "$@"
[[ -e $out/export ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$out/sft" --output "$out/export"
