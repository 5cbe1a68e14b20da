#!/usr/bin/env bash
# TinyLLaVA from a small decoder, SigLIP and the published conversations to a Hugging Face export.
#
#   examples/tinyllava/run.sh --llm DIR --tower DIR --pretrain-json FILE --pretrain-images DIR \
#       --sft-json FILE --sft-images DIR --output DIR [--recipe base] [--decoder phi2] \
#       [--share-json FILE --share-images DIR] [-- --parallel.tp 4 ...]
#
# --recipe           base (default), share or factory
# --decoder          phi2 (default); with --recipe factory also tinyllama, stablelm2 or qwen2
# --llm, --tower     microsoft/phi-2 (or that of --decoder) and google/siglip-so400m-patch14-384
# --pretrain-json    blip_laion_cc_sbu_558k.json, its pictures under --pretrain-images
# --share-json       share-captioner_coco_lcs_sam_1246k_1107.json, for --recipe share; under --share-images
# --sft-json         llava_v1_5_mix665k.json, or ShareGPT4V's mix for --recipe share; under --sft-images
# --output           folder for all that is made; the result is in its export/
# What follows -- goes to every training. PROCESSES and NODES are those of examples/launch/torchrun.sh.
#
# Started again, it goes on where it stopped.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}

declare -A given=([recipe]=base [decoder]=phi2)
names="llm tower pretrain-json pretrain-images sft-json sft-images output recipe decoder"
more="share-json share-images"
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 == --* && " $names $more " == *" ${1#--} "* ]] || fail "$1: no such option; there are --${names// / --} --${more// / --}"
    (($# > 1)) || fail "$1: what it stands for is missing"
    given[${1#--}]=$2
    shift 2
done
(($#)) && shift # the --
case ${given[recipe]} in
base) stages="pretrain sft" prefix= ;;
share) stages="pretrain share_pretrain share_sft" prefix= names+=" $more" ;;
factory) stages="pretrain sft" prefix=factory_ ;;
*) fail "--recipe ${given[recipe]}: there are base, share and factory" ;;
esac
case ${given[decoder]} in
phi2 | stablelm2) template=phi ;;
tinyllama) template=llama ;;
qwen2) template=qwen2_base ;;
*) fail "--decoder ${given[decoder]}: there are phi2, tinyllama, stablelm2 and qwen2" ;;
esac
[[ $prefix || ${given[decoder]} == phi2 ]] || fail "--decoder ${given[decoder]} needs --recipe factory"
for name in $names; do
    [[ -n ${given[$name]:-} ]] || fail "--$name is missing; see the head of $0"
done
folders="llm tower pretrain-images sft-images" files="pretrain-json sft-json"
[[ ${given[recipe]} != share ]] || folders+=" share-images" files+=" share-json"
for name in $folders; do
    [[ -d ${given[$name]} ]] || fail "--$name ${given[$name]}: no such folder"
done
for name in $files; do
    [[ -f ${given[$name]} ]] || fail "--$name ${given[$name]}: no such file"
done
for name in $folders $files output; do
    given[$name]=$(realpath -m "${given[$name]}")
done
out=${given[output]}

cd "$(dirname "$0")/../.."
# The first generation keeps every patch of SigLIP, which its config.json says; the second one's way is the default.
described=(--hf examples/tinyllava/bench-phi2)
[[ ${given[recipe]} != factory ]] || described=()
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
# Every command writes aside and renames at the end: what is there is whole.
preprocess() { # SET TEMPLATE
    [[ -e $out/data/$1.json ]] || "$python" data_tools/preprocess.py --family tinyllava --tokenizer "${given[llm]}" \
        --template "$2" --input "${given[$1-json]}" --image-dir "${given[$1-images]}" --output "$out/data/$1" \
        --workers "$(nproc)"
}
train() { # STAGE SET START [OPTION ...]
    examples/launch/torchrun.sh "examples/tinyllava/$prefix$1.py" --model.pretrained "$3" --data.path "$out/data/$2" \
        --checkpoint.dir "$out/$1" "${@:4}"
}

preprocess pretrain plain
preprocess sft "$template"
[[ ${given[recipe]} != share ]] || preprocess share plain
[[ -e $out/start ]] || "$python" tools/checkpoint/hf_to_megatron.py --llm "${given[llm]}" --tower "${given[tower]}" \
    "${described[@]}" --family tinyllava --seed 42 --output "$out/start"
start=$out/start
for stage in $stages; do
    case $stage in
    pretrain) set=pretrain ;;
    share_pretrain) set=share ;;
    *) set=sft ;;
    esac
    train "$stage" "$set" "$start" "$@"
    start=$out/$stage
done
[[ -e $out/export ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$start" --output "$out/export"
