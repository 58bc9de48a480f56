"""How fast texts are written from left to right, beside transformers' Llama of the same shape.

    python -m benchmarks.writing [--texts 1 16 64 --tokens 128 --repetitions 3] > benchmarks/results/writing.md

The rival is `LlamaForCausalLM.generate` with its KV cache: as deep and wide as the model of the `left-to-right`
recipe, the same vocabulary, tokens drawn at temperature 1. Both are untrained, for speed does not depend on what a
model knows, and neither ends a text early. They take turns in one process; what is compared is CPU time.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import print_row, print_table, print_title, ratios, spread, take_turns
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.sampler import sample
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings.command_line import recipe_values
from ds_tokimg.tokens.codec import TokenCodec

TARGET = 1.0


def ours() -> JiT:
    """The model of the recipe."""
    recipe = recipe_values("left-to-right")
    codec = TokenCodec(recipe["vocab_size"], recipe["token_size"])
    shape = {name: recipe[name] for name in ("noisy_depth", "block_size", "layout", "head")}
    return JiT.from_name(recipe["model"], codec, **shape).eval()


def llama(model: JiT, tokens: int) -> LlamaForCausalLM:
    """One of the same shape."""
    config = LlamaConfig(
        vocab_size=model.codec.vocab_size,
        hidden_size=model.config.width,
        intermediate_size=model.state_dict()["layers.0.mlp.down.weight"].shape[1],
        num_hidden_layers=model.config.depth,
        num_attention_heads=model.config.heads,
        max_position_embeddings=tokens + 1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def rivals(model: JiT, rival: LlamaForCausalLM, count: int, tokens: int) -> dict[str, Callable[[], object]]:
    begin = torch.zeros(count, 1, dtype=torch.long)
    keywords = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    return {
        "ours": lambda: sample(model, [tokens] * count, SamplingOptions(batch_size=count)),
        "llama": lambda: rival.generate(begin, attention_mask=torch.ones_like(begin), **keywords),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_title("Writing from left to right")
    model = ours()
    rival = llama(model, args.tokens)
    print(f"{args.tokens} tokens a text; {parameters(model)} parameters, Llama's {parameters(rival)}.\n")
    print_table("texts", "tokens per CPU second", "Llama's", f"ratio (target: {TARGET})")
    for count in args.texts:
        seconds = take_turns(rivals(model, rival, count, args.tokens), args.repetitions, clock=time.process_time)
        rates = {name: [count * args.tokens / value for value in values] for name, values in seconds.items()}
        ratio = ratios(rates["ours"], rates["llama"])
        print_row(count, spread(rates["ours"], 0), spread(rates["llama"], 0), spread(ratio))


if __name__ == "__main__":
    main()
