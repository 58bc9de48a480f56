"""A training loop without DeepSpeed: characters become pixels, a small JiT learns to remove noise from them and writes.

    python -m examples.plain_loop [--text FILE] [--steps 200]

About a minute on one core. It prints what a character of the last tenth of the text costs, in bits: guessing first,
then the trained model (`ds_tokimg.bits_per_token`, a bound on the likelihood). It ends with a text made from noise.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch

from ds_tokimg import JiT, TokenCodec, add_noise_to_timestep, bits_per_token, masked_loss

IMG_SIZE, PATCH, LENGTH, BATCH = 16, 2, 64, 8  # a character fills a patch; 64 of them an image


def train(model: JiT, ids: list[int], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        images = [model.codec.encode(ids[start : start + LENGTH], IMG_SIZE, patch_size=PATCH) for start in starts]
        clean, mask = map(torch.stack, zip(*images, strict=True))  # [B, 3, H, W] in [-1, 1], [B, H, W]
        t = torch.randint(300, 900, (BATCH,))  # where characters are neither plain to read nor lost in noise
        noisy, _ = add_noise_to_timestep(clean, t)
        loss = masked_loss(model(noisy, t, None, mask), clean, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def write(model: JiT, steps: int = 64) -> list[int]:
    """From noise to characters in small steps along the model's own path: an Euler step is exact while the prediction
    stays the same."""
    grid = torch.linspace(999, 0, steps + 1)
    noisy = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    for t, s in pairwise(grid):
        clean = model(noisy, t[None])
        noisy = s / t * noisy + ((1 - s / 1000) - (1 - t / 1000) * s / t) * clean
    return model.codec.decode(noisy[0], patch_size=PATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "data" / "web_narrative.txt")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")[:500_000]
    alphabet = sorted(set(text))
    ids = [alphabet.index(character) for character in text]
    seen, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    torch.manual_seed(0)
    model = JiT.from_name("JiT-XS/2", TokenCodec(len(alphabet), token_size=PATCH), IMG_SIZE)
    pieces = [held_out[start : start + LENGTH] for start in range(0, min(len(held_out), 16 * LENGTH), LENGTH)]
    print(f"guessing: {bits_per_token(model, pieces):.2f} bits a character of {len(alphabet)}")
    train(model, seen, args.steps)
    print(f"trained: {bits_per_token(model.eval(), pieces):.2f} bits a character")
    print("written:", repr("".join(alphabet[i] for i in write(model))))


if __name__ == "__main__":
    main()
