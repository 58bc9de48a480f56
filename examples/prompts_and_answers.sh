#!/usr/bin/env bash
# Prompts and answers: sums of two numbers below 100. A fifth of them is kept out of training; 200 of these are asked.
#
#   bash examples/prompts_and_answers.sh [FOLDER] [train flag ...]
#
# FOLDER: new (runs/sums). About eight minutes on one core, after which 99 of 100 held-out sums are answered right
# (benchmarks/arithmetic.py). For your own: a .jsonl file with {"prompt": ..., "answer": ...} a line.
set -euo pipefail
run=${1:-runs/sums}
mkdir -p "$run/data"

python - "$run/data" <<'PYTHON'
import json, pathlib, random, sys

folder, pairs = pathlib.Path(sys.argv[1]), [(a, b) for a in range(100) for b in range(100)]
random.Random(0).shuffle(pairs)
records = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
for name, part in (("train", records[:8000]), ("held_out", records[8000:8200])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
(folder / "prompts.txt").write_text("".join(record["prompt"] + "\n" for record in records[8000:8200]))
PYTHON

# --enable_condition: a prompt is an image of its own that the answer's image is conditioned on. An answer has an image to
# itself (--no_packing), its tokens are bytes (--vocab_size 257), one a patch (--token_size 2).
python -m ds_tokimg train --data_path "$run/data/train.jsonl" --eval_data_path "$run/data/held_out.jsonl" \
    --enable_condition --no_packing --model JiT-XS/2 --token_size 2 --vocab_size 257 --max_tokens 16 --timesteps band \
    --train_batch_size 128 --lr 3e-3 --epochs 20 --num_samples 0 --output_dir "$run" "${@:2}"

python -m ds_tokimg generate --checkpoint "$run" --prompt "17+25="
python -m ds_tokimg generate --checkpoint "$run" --prompt_file "$run/data/prompts.txt" --json "$run/answers.json" >"$run/answers.txt"
python - "$run/answers.json" <<'PYTHON'
import json, sys

answers = json.load(open(sys.argv[1]))
right = sum(str(sum(map(int, answer["prompt"].strip("=").split("+")))) == answer["text"] for answer in answers)
print(f"{right} of {len(answers)} held-out sums are right")
PYTHON
