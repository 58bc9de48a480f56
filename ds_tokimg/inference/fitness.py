"""Whether options fit a model: what can have no effect is refused, what is not what one might think is said."""

from __future__ import annotations

from collections.abc import Collection

from ds_tokimg.errors import UserError
from ds_tokimg.inference.loading import TrainedModel
from ds_tokimg.inference.options import SamplingOptions, guidance_problem
from ds_tokimg.inference.texts import say


def check(
    trained: TrainedModel, options: SamplingOptions, has_prompt: bool = True, asked: Collection[str] = ()
) -> None:
    """Raises UserError for an option that this model can do nothing with.

    Args:
        has_prompt: there is something to answer.
        asked: names of options that were asked for, beside those that are not at their defaults.
    """
    asked = {*asked, *(["eta"] if options.eta != SamplingOptions.eta else [])}
    problem = _problem(trained, options, has_prompt, "eta" in asked)
    if problem is not None:
        raise UserError(problem)
    for remark in _remarks(trained, options, "eta" in asked):
        say(remark)


def _problem(trained: TrainedModel, options: SamplingOptions, has_prompt: bool, asks_eta: bool) -> str | None:
    problem = guidance_problem(options.guidance_scale, trained.format.enable_condition, has_prompt)
    if problem is not None:
        return problem
    if not options.is_as_trained and not trained.model.head.features:
        return (
            "temperature, top_k and top_p reshape a distribution over tokens, and this model (linear head) predicts "
            "colours alone: leave them out"
        )
    if asks_eta and options.sampler != "ancestral":
        return f"eta is how much noise the sampler ancestral replaces; {options.sampler} replaces none: leave it out"
    return None


def _remarks(trained: TrainedModel, options: SamplingOptions, asks_eta: bool) -> list[str]:
    as_trained, writing = trained.model.writing, trained.model.writing.asked(options.block_size)
    steps, remarks = options.steps, []
    if writing.block_size != as_trained.block_size:
        remarks.append(f"this model was trained to write {_way(as_trained.block_size)}, not {_way(writing.block_size)}")
    drawn_at_once = options.sampler == "ancestral" and writing.one_step
    if drawn_at_once and steps is not None and steps > 1:
        remarks.append(f"one step draws the tokens of this model exactly: {steps} take longer and are no better")
    if asks_eta and (steps == 1 or (drawn_at_once and steps is None)):
        remarks.append("eta has no effect in a single step, which replaces no noise")
    if options.sampler == "heun" and steps is not None and steps % 2:
        taken = max(1, steps // 2)
        remarks.append(f"heun evaluates the network twice a step, and once in the last: {taken} step(s) are taken")
    return remarks


def _way(block_size: int) -> str:
    return f"blocks of {block_size} patch(es) from left to right" if block_size else "the whole image at once"
