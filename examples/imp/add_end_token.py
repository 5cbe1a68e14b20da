"""A directory of Phi-2 whose tokenizer has Imp's end token: </s>, the first id behind Phi-2's own, 50295 of 51200.

    python examples/imp/add_end_token.py LLM OUTPUT

The weights are linked, not copied. Imp pads with Phi-2's own end token. Source: the authors' train.py.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from megamm.errors import MegammError
from megamm.weights.hf import new_directory

END, PAD = "</s>", "<|endoftext|>"


def main(llm: Path, output: Path) -> None:
    """Write `output`, which must not exist yet."""
    tokenizer = AutoTokenizer.from_pretrained(str(llm), local_files_only=True)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": PAD})
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with new_directory(output) as aside:
        tokenizer.save_pretrained(aside)
        (aside / "config.json").write_text(json.dumps(json.loads((llm / "config.json").read_text()) | ids, indent=2))
        for path in llm.resolve().iterdir():
            if path.is_file() and not (aside / path.name).exists():
                (aside / path.name).symlink_to(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: give the directory of Phi-2 and that to write")
    if not (Path(sys.argv[1]) / "config.json").is_file():
        sys.exit(f"error: {sys.argv[1]}/config.json is missing; give the directory of Phi-2")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
