# What the run.sh of every family sources: its options, and the steps that are the same for all.
#
# A run.sh declares `given` with its defaults and calls read_given and check_given. From then on it is in the root of the
# repository, `out` is --output and all paths are absolute. Every command writes aside and renames at the end: what is
# there is whole, and is left as it is.

fail() {
    echo "error: $1" >&2
    exit 1
}

# --NAME VALUE ... [-- WORD ...] becomes given[NAME]=VALUE ... and rest=(WORD ...).
read_given() { # "NAME ..." "$@"
    local names=$1
    shift
    while (($#)) && [[ $1 != -- ]]; do
        [[ $1 == --* && " $names " == *" ${1#--} "* ]] || fail "$1: no such option; there are --${names// / --}"
        (($# > 1)) || fail "$1: what it stands for is missing"
        given[${1#--}]=$2
        shift 2
    done
    rest=("${@:2}") # without the --
}

# Every option has a value, every folder and file is there.
check_given() { # NAME ...
    local name
    for name; do
        [[ -n ${given[$name]:-} ]] || fail "--$name is missing; see the head of $0"
    done
    for name; do
        case $name in
        llm | tower | *-images) [[ -d ${given[$name]} ]] || fail "--$name ${given[$name]}: no such folder" ;;
        *-json) [[ -f ${given[$name]} ]] || fail "--$name ${given[$name]}: no such file" ;;
        output) ;;
        *) continue ;;
        esac
        given[$name]=$(realpath -m "${given[$name]}")
    done
    out=${given[output]}
    cd "$(dirname "$0")/../.."
    python=python3
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
}

# --SET-json with the pictures of --SET-images -> data/SET
preprocess() { # FAMILY SET [OPTION ...]
    [[ -e $out/data/$2.json ]] || "$python" data_tools/preprocess.py --family "$1" --tokenizer "${given[llm]}" \
        --input "${given[$2-json]}" --image-dir "${given[$2-images]}" --output "$out/data/$2" \
        --workers "$(nproc)" "${@:3}"
}

# --llm and --tower -> start
join() { # FAMILY [OPTION ...]
    [[ -e $out/start ]] || "$python" tools/checkpoint/hf_to_megatron.py --llm "${given[llm]}" \
        --tower "${given[tower]}" --family "$1" --seed 42 --output "$out/start" "${@:2}"
}

# START, trained on data/SET -> STAGE. The recipe is $recipe, in which STAGE stands for its name.
train() { # STAGE SET START
    examples/launch/torchrun.sh "${recipe/STAGE/"$1"}" --model.pretrained "$out/$3" --data.path "$out/data/$2" \
        --checkpoint.dir "$out/$1" "${rest[@]}"
}

# STAGE -> the Hugging Face checkpoint NAME
export_hf() { # STAGE NAME [OPTION ...]
    [[ -e $out/$2 ]] || "$python" tools/checkpoint/megatron_to_hf.py --checkpoint "$out/$1" --output "$out/$2" "${@:3}"
}
