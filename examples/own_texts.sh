#!/usr/bin/env bash
# A language model of your own texts: train, measure, write, export, use.
#
#   bash examples/own_texts.sh FILE [FOLDER] [train flag ...]
#
# FILE: a text a line (.txt), or .jsonl, .json, .parquet, or a folder of these. FOLDER: of the run, new (runs/own). How long
# it takes follows from the texts: about five minutes on two cores for the bundled corpus, data/web_narrative.txt.
set -euo pipefail
texts=${1:?"which texts? bash examples/own_texts.sh FILE [FOLDER] [train flag ...]"}
run=${2:-runs/own}

# The recipe (at-once) fixes the method; batch, learning rate and number of epochs follow from the texts.
python -m ds_tokimg train --data_path "$texts" --output_dir "$run" "${@:3}"

# What a token of the held-out texts costs, in bits; the end of the training run says what guessing costs.
python -m ds_tokimg evaluate --checkpoint "$run" --data_path "$texts" --json "$run/figures.json"

python -m ds_tokimg generate --checkpoint "$run" --num_samples 2 --save_images "$run/pictures"

# An export is the averaged weights, the codec and the tokenizer: it needs no DeepSpeed.
python -m ds_tokimg export --checkpoint "$run" --output "$run/exported"
python - "$run/exported" <<'PYTHON'
import sys

from ds_tokimg import JiT

model = JiT.from_pretrained(sys.argv[1])
print(f"exported: {sum(p.numel() for p in model.parameters()):,} parameters, {model.codec}")
PYTHON
