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

source "$(dirname "$0")/../launch/steps.sh"

names="llm tower pretrain-json pretrain-images sft-json sft-images output recipe decoder"
more="share-json share-images"
declare -A given=([recipe]=base [decoder]=phi2)
read_given "$names $more" "$@"
# The first generation keeps every patch of SigLIP, which its config.json says; the second one's way is the default.
described=(--hf examples/tinyllava/bench-phi2) prefix=
case ${given[recipe]} in
base) ;;
share) names+=" $more" ;;
factory) described=() prefix=factory_ ;;
*) fail "--recipe ${given[recipe]}: there are base, share and factory" ;;
esac
case ${given[decoder]} in
phi2 | stablelm2) template=phi ;;
tinyllama) template=llama ;;
qwen2) template=qwen2_base ;;
*) fail "--decoder ${given[decoder]}: there are phi2, tinyllama, stablelm2 and qwen2" ;;
esac
[[ $prefix || ${given[decoder]} == phi2 ]] || fail "--decoder ${given[decoder]} needs --recipe factory"
check_given $names
recipe=examples/tinyllava/${prefix}STAGE.py

preprocess tinyllava pretrain --template plain
preprocess tinyllava sft --template "$template"
[[ ${given[recipe]} != share ]] || preprocess tinyllava share --template plain
join tinyllava "${described[@]}"
train pretrain pretrain start
if [[ ${given[recipe]} == share ]]; then
    train share_pretrain share pretrain
    train share_sft sft share_pretrain
    export_hf share_sft export
else
    train sft sft pretrain
    export_hf sft export
fi
