"""Which noise levels a model pays for: the integrand of the bound of many small steps, level by level.

    python -m benchmarks.levels --checkpoint runs/first --data_path data/web_narrative.txt

Where tokens are drawn one by one, a model says at pure noise what the context tells it, and by Bayes' rule that fixes
what it should say at every other level. What it would pay if it did is printed beside what it pays: the difference is
what many small steps lose.
"""

import argparse
import itertools
import math

import numpy as np
import torch

from benchmarks import ROOT
from ds_tokimg.commands.evaluate import open_texts
from ds_tokimg.data.batch import blocks_of
from ds_tokimg.diffusion.path import START, add_noise_to_timestep, alpha_sigma, bound_range, timestep_of_log_snr
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.model.context import Patches, TeacherForced, WholeImage
from ds_tokimg.model.heads.base import Prediction
from ds_tokimg.training.objective import TrainingLoss


@torch.no_grad()
def rates(trained, texts: list[np.ndarray], log_snrs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Bits a token per unit of log-SNR at each of `log_snrs`: what the model pays, and what it would with what it says
    at pure noise (None where several tokens are drawn at once)."""
    model, generator = trained.model, torch.Generator().manual_seed(0)
    writing = model.writing
    ids, mask = trained.layout.pack(texts)
    clean = TrainingLoss(model, trained.format.objective).colours(ids)
    seen = WholeImage()
    if writing.block_size:
        seen = TeacherForced(clean, blocks_of(ids.shape[1], writing.block_size))

    def at(timestep: torch.Tensor) -> tuple[Prediction, torch.Tensor | None]:
        """The prediction, and what the noisy values say by themselves."""
        t = timestep.float().expand(len(clean))
        noisy = add_noise_to_timestep(clean, t, torch.randn(clean.shape, generator=generator))[0]
        alone = model.head.log_likelihood(noisy, *alpha_sigma(t[:, None])) if in_one_step else None
        return model.predict(Patches(noisy, t, mask), seen), alone

    def rate(prediction: Prediction, log_snr: float) -> float:
        error = ((prediction.clean - clean) ** 2).unflatten(-1, (model.slots, -1)).sum(-1) * mask
        return float(0.5 * math.exp(log_snr) * error.sum() / mask.sum() / math.log(2))

    in_one_step = writing.one_step and not writing.in_turn
    if in_one_step:
        prediction, alone = at(torch.tensor(START))
        said = prediction.logits - alone
    paid, known = [], []
    for log_snr in log_snrs:
        prediction, alone = at(timestep_of_log_snr(torch.tensor(log_snr)))
        paid.append(rate(prediction, log_snr))
        if in_one_step:
            known.append(rate(Prediction.of_logits(model.head, said + alone), log_snr))
    return np.array(paid), np.array(known) if in_one_step else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_path", default=str(ROOT / "data" / "web_narrative.txt"))
    parser.add_argument("--texts", type=int, default=32)
    arguments = parser.parse_args()
    trained = load_trained(arguments.checkpoint)
    if trained.format.enable_condition:
        parser.error("not for models with conditions")
    dataset, _ = open_texts(trained, arguments.data_path)
    texts = [dataset.ids(i) for i in range(min(arguments.texts, len(dataset)))]
    band = bound_range(trained.layout.codec.radix)
    edges = np.linspace(band.low, band.high, 13)
    inside = np.linspace(band.low, band.high, 49)[:-1] + (band.high - band.low) / 96  # four levels in each of the bins
    paid, known = rates(trained, texts, inside)
    width = (band.high - band.low) / 48
    print("| log-SNR | timesteps | bits/token |" + (" as known at pure noise |" if known is not None else ""))
    print("|---" * (4 if known is not None else 3) + "|")
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        times = timestep_of_log_snr(torch.tensor([low, high])).tolist()
        cells = [f"{low:.1f} to {high:.1f}", f"{times[0]:.0f} to {times[1]:.0f}"]
        cells += [f"{column[4 * index :][:4].sum() * width:.3f}" for column in (paid, known) if column is not None]
        print("| " + " | ".join(cells) + " |")
    totals = [f"{column.sum() * width:.3f}" for column in (paid, known) if column is not None]
    print("| all | | " + " | ".join(totals) + " |")


if __name__ == "__main__":
    main()
