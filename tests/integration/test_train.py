"""Whole runs of the trainer through its own entry points: files, resume, precision, conditions, fine-tuning."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ds_tokimg.__main__ import main
from ds_tokimg.commands.evaluate import open_texts
from ds_tokimg.errors import UserError
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.bound import bits_per_token
from tests.support.runs import learned, metrics, small_flags, train_in_ranks

pytestmark = pytest.mark.usefixtures("cache")

SHIPPED = json.loads((Path(__file__).parents[2] / "ds_config.json").read_text())


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of 8 steps and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, train_in_ranks(1, small_flags(corpus, folder, "--max_steps", 8, "--num_samples", 1, "--verbose"))


def with_json(folder: Path, **changes) -> list:
    path = folder / "edited.json"
    path.write_text(json.dumps(SHIPPED | changes))
    return ["--deepspeed_config", path]


def test_a_run_leaves_the_files_of_the_contract(run):
    folder, printed = run
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 9))
    expected = "step epoch consumed_samples loss lr grad_norm loss_scale skipped_steps valid_tokens"
    expected += " valid_tokens_per_second step_seconds padding_fraction"
    expected += " data_wait model_flops_per_second peak_share"
    assert all(set(expected.split()) <= set(row) for row in rows)
    assert {"val_loss", "val_bits_per_token", "val_bits_per_byte", "val_token_accuracy"} <= set(rows[7])
    assert "val_loss" not in rows[6]
    assert '"auto"' not in (folder / "ds_config.json").read_text()
    assert TrainConfig.load(folder / "config.json").seed == 1
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert (folder / "checkpoints" / (folder / "checkpoints" / "best").read_text().strip()).is_dir()
    words = ("bits/token", "in turn", "grad norm", "tokens/s", "left", "unigram entropy", "samples:")
    for word in (*words, "tensorboard --logdir"):
        assert word in printed


def test_the_commands_that_a_run_ends_with_go_on_with_it(run, corpus, capsys):
    folder, printed = run
    lines = dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)
    words = {what: shlex.split(lines[what]) for what in ("resume", "generate", "evaluate", "scale up")}
    for what in ("evaluate", "generate"):
        assert words[what][:3] == ["python", "-m", "ds_tokimg"]
        assert main(words[what][3:]) == 0
    assert "bits per token" in capsys.readouterr().out
    resumed, larger = (train_config(words[what][4:]) for what in ("resume", "scale up"))
    own = TrainConfig.load(folder / "config.json")
    assert (resumed.output_dir, resumed.seed, resumed.recipe) == (str(folder), 1, "at-once")
    assert (larger.model, larger.img_size, larger.timesteps) == ("JiT-B/4", own.img_size, own.timesteps)


def test_what_was_left_open_is_decided_told_and_written_down(corpus, tmp_path):
    flags = ["--data_path", corpus, "--output_dir", tmp_path / "run", "--model", "JiT-XS/4", "--img_size", 16]
    flags += ["--max_tokens", 64, "--vocab_size", 300, "--max_steps", 1, "--num_samples", 0]
    printed = train_in_ranks(2, list(map(str, flags)))
    config = TrainConfig.load(tmp_path / "run" / "config.json")
    # The tiny model is 32 wide, and the corpus small.
    assert (config.lr, config.train_batch_size) == (6e-3 * 192 / 32, 4)
    assert "automatic: lr 0.036 for JiT-XS/4, train batch 4" in printed
    assert f"{config.epochs} epoch(s)" in printed
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["optimizer"]["params"]["lr"] == config.lr


def test_lines_fit_a_terminal(run):
    """All but notes, which are sentences, what is to be copied, and the steps, which are --verbose here."""
    lines = run[1].split("TensorBoard:")[0].splitlines()
    long = [line for line in lines if len(line) > 80 and not line.startswith(("note: ", "step ", "saved ", "["))]
    assert len(lines) > 10 and long == []


def test_a_short_schedule_is_said_aloud(run):
    assert "too few to learn much: give --epochs above 1" in run[1]


def test_auto_starts_a_run_and_goes_on_with_it(corpus, tmp_path):
    """Several ranks decide alike."""
    flags = small_flags(corpus, tmp_path / "run", "--resume", "auto", "--save_interval", 2)
    assert "resumed" not in train_in_ranks(2, [*flags, "--max_steps", "2"])
    printed = train_in_ranks(2, [*flags, "--lr", "2e-3"])
    assert "resumed" in printed and "note: from here on --lr is 0.002; it was 0.001" in printed
    printed = train_in_ranks(2, flags)
    assert "nothing is left to train: step 4 is reached, and --max_steps ends at 4" in printed
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_without_validation(corpus, tmp_path):
    printed = train_in_ranks(1, small_flags(corpus, tmp_path / "run", "--eval_fraction", 0, "--num_samples", 1))
    assert "0 validation images" in printed and "samples:" in printed
    assert not any("val_loss" in row for row in metrics(tmp_path / "run"))
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--num_inference_steps", "2"]) == 0


def test_a_run_goes_on_with_its_own_json_in_its_own_folder(corpus, tmp_path):
    folder = tmp_path / "run"
    stage = with_json(tmp_path, zero_optimization={"stage": 2}, gradient_clipping=0.5)
    train_in_ranks(2, small_flags(corpus, folder, *stage, "--max_steps", 2, "--save_interval", 2))
    (tmp_path / "edited.json").unlink()
    assert "ZeRO stage 2" in train_in_ranks(1, ["--resume", str(folder), "--max_steps", "3"])
    assert len(metrics(folder)) == 3
    assert json.loads((folder / "ds_config.json").read_text())["gradient_clipping"] == 0.5


def test_the_tokenizer_of_a_run_loads_with_auto_tokenizer(run):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run[0] / "tokenizer")
    assert tokenizer.decode(tokenizer("the old house")["input_ids"]) == "the old house"


def test_resume_is_bit_identical_to_an_uninterrupted_run(run, corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run")
    train_in_ranks(1, flags)  # 4 steps
    printed = train_in_ranks(1, ["--resume", "latest", "--output_dir", str(tmp_path / "run"), "--max_steps", "8"])
    assert "resumed" in printed
    assert learned(metrics(tmp_path / "run")) == learned(metrics(run[0]))
    for name in ("model", "ema_0.9999"):
        path = f"checkpoints/step_00000008/{name}.safetensors"
        resumed, whole = load_file(tmp_path / "run" / path), load_file(run[0] / path)
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_resuming_from_a_named_checkpoint_drops_what_came_after(run, corpus, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    checkpoint = folder / "checkpoints" / "step_00000004"
    flags = ["--resume", str(checkpoint), "--output_dir", str(folder), "--max_steps", "6"]
    train_in_ranks(1, flags)
    assert learned(metrics(folder))[:5] == learned(metrics(run[0]))[:5]
    assert len(metrics(folder)) == 6


def test_evaluate_gives_the_validation_figure_of_the_run(run, corpus, tmp_path):
    json_file = tmp_path / "figures.json"
    checkpoint = run[0] / "checkpoints" / "step_00000008"
    assert (
        main(["evaluate", "--checkpoint", str(checkpoint), "--data_path", str(corpus), "--json", str(json_file)]) == 0
    )
    figures, row = json.loads(json_file.read_text()), metrics(run[0])[7]
    assert figures["bits_per_token"] == pytest.approx(row["val_bits_per_token"], rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(row["val_bits_per_byte"], rel=1e-6)
    assert figures["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    assert {"tokens", "bytes", "token_accuracy", "invalid_token_rate"} <= set(figures)


def test_generate_and_export(run, tmp_path, capsys):
    exported, json_file = tmp_path / "export", tmp_path / "texts.json"
    assert main(["export", "--checkpoint", str(run[0]), "--output", str(exported)]) == 0
    arguments = ["--num_samples", "3", "--num_inference_steps", "4", "--save_images", str(tmp_path / "images")]
    assert main(["generate", "--checkpoint", str(exported), "--json", str(json_file), *arguments]) == 0
    texts = json.loads(json_file.read_text())
    assert len(texts) == 3 and set(texts[0]) >= {"prompt", "text", "token_ids", "num_tokens"}
    assert all(text["num_tokens"] == len(text["token_ids"]) <= 64 for text in texts)
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    again = tmp_path / "again.json"
    assert main(["generate", "--checkpoint", str(run[0]), "--json", str(again), *arguments[:4]]) == 0
    ids = [text["token_ids"] for text in json.loads(again.read_text())]
    assert ids == [text["token_ids"] for text in texts]  # the run's best checkpoint is what was exported


def test_an_export_loads_without_deepspeed(run, tmp_path):
    from ds_tokimg import JiT, TokenCodec, add_noise_to_timestep

    main(["export", "--checkpoint", str(run[0]), "--output", str(tmp_path / "export")])
    model = JiT.from_pretrained(tmp_path / "export")
    assert isinstance(model.codec, TokenCodec)
    image, mask = model.codec.encode(np.arange(30), 16)
    noisy, _ = add_noise_to_timestep(image[None], torch.tensor([400]))
    assert model(noisy, torch.tensor([400]), mask=mask[None]).shape == (1, 3, 16, 16)


def test_a_prompt_is_continued_by_a_model_without_conditions(run, tmp_path):
    json_file = tmp_path / "texts.json"
    flags = ["--prompt", "the old house", "--num_inference_steps", "4", "--json", str(json_file)]
    assert main(["generate", "--checkpoint", str(run[0]), *flags]) == 0
    assert json.loads(json_file.read_text())[0]["prompt"] == "the old house"


@pytest.mark.parametrize("block_size", ["0", "1"])
def test_gaps_are_filled_and_all_else_stays(block_size, run, tmp_path):
    from ds_tokimg.tokens.tokenizer import encode

    text, json_file = "the <gap:5> house was<gap:3>", tmp_path / "texts.json"
    flags = ["--infill", text, "--num_samples", "2", "--block_size", block_size, "--json", str(json_file)]
    assert main(["generate", "--checkpoint", str(run[0]), "--num_inference_steps", "4", *flags]) == 0
    first, second = json.loads(json_file.read_text())
    tokenizer = load_trained(str(run[0])).tokenizer
    known = [encode(tokenizer, [piece])[0].tolist() for piece in ("the ", " house was")]
    for filled in (first, second):
        ids, behind = filled["token_ids"], len(known[0]) + 5
        assert ids[: len(known[0])] == known[0] and ids[behind : behind + len(known[1])] == known[1]
        assert filled["num_tokens"] == len(ids) == behind + len(known[1]) + 3
        assert filled["prompt"] == text and filled["text"].startswith("the ") and " house was" in filled["text"]
    assert first["token_ids"] != second["token_ids"]


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        {"gradient_accumulation_steps": 2, "gradient_clipping": 0.1, "zero_optimization": {"stage": 3}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_json_alone_decides_precision_stage_accumulation_and_clipping(changes, run, corpus, tmp_path):
    try:
        train_in_ranks(2, small_flags(corpus, tmp_path / "run", *with_json(tmp_path, **changes)))
    except AssertionError as error:
        assert "fp16.enabled is true, but cpu cannot compute in it here" in str(error)
        assert not (tmp_path / "run").exists()
        pytest.skip("this processor has no fp16: the run is refused, and nothing was written")
    rows, reference = metrics(tmp_path / "run"), metrics(run[0])
    tolerance = 1e-3 if "gradient_clipping" in changes else 2e-2  # AdamW all but undoes a change of scale
    if "fp16" not in changes:  # its loss scale starts too high: the first steps are skipped
        assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in reference[:4]], rel=tolerance)
    resolved = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    assert resolved["zero_optimization"]["stage"] == changes["zero_optimization"]["stage"]


def test_prompts_and_answers_from_a_mixed_folder(tmp_path, corpus):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text(corpus.read_text()[:2000])
    pairs = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(200)]
    (data / "b.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    output = tmp_path / "run"
    printed = train_in_ranks(2, small_flags(data, output, "--enable_condition", "--num_samples", 2))
    assert "samples:" in printed and "+" in printed.split("samples:")[1]
    json_file = tmp_path / "texts.json"
    flags = ["--prompt", "4+4=", "--guidance_scale", "2", "--num_inference_steps", "4", "--json", str(json_file)]
    assert main(["generate", "--checkpoint", str(output), *flags]) == 0
    assert json.loads(json_file.read_text())[0]["prompt"] == "4+4="


def test_fine_tuning_starts_from_the_weights_tokenizer_and_codec_of_a_checkpoint(run, corpus, tmp_path):
    tuned = tmp_path / "tuned"
    train_in_ranks(1, small_flags(corpus, tuned, "--init_from", run[0], "--max_steps", 1, "--lr", "1e-9"))
    before, after = load_trained(str(run[0])), load_trained(str(tuned), "trained")
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    for name, value in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], value, atol=1e-7, rtol=0)


def test_semantic_palette(corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", "--palette", "semantic", "--max_steps", 2)
    train_in_ranks(2, flags)
    train_in_ranks(
        1, ["--resume", "latest", "--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--num_samples", "0"]
    )
    assert len(metrics(tmp_path / "run")) == 3
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--data_path", str(corpus)]) == 0


@pytest.mark.parametrize("condition", [[], ["--enable_condition"]])
def test_blocks_from_left_to_right(corpus, tmp_path, condition, capsys):
    """Trained, resumed on other ranks, evaluated and written block by block, and evaluated as one image too."""
    data = corpus
    if condition:
        data = tmp_path / "pairs.jsonl"
        rows = [{"prompt": f"count to {i}", "answer": " ".join(map(str, range(i % 20)))} for i in range(1, 60)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = small_flags(data, tmp_path / "run", "--block_size", 1, "--noisy_depth", 1, "--max_steps", 2, *condition)
    train_in_ranks(2, flags)
    train_in_ranks(1, ["--resume", "latest", "--output_dir", str(tmp_path / "run"), "--max_steps", "3"])
    rows, whole = metrics(tmp_path / "run"), tmp_path / "whole.json"
    assert len(rows) == 3 and all("bits_per_token_many_steps" in row for row in rows)
    evaluate = ["evaluate", "--checkpoint", str(tmp_path / "run" / "checkpoints" / "step_00000003"), "--data_path"]
    assert main([*evaluate, str(data), "--json", str(tmp_path / "blocks.json")]) == 0
    assert main([*evaluate, str(data), "--block_size", "0", "--json", str(whole)]) == 0
    blocks = json.loads((tmp_path / "blocks.json").read_text())["bits_per_token"]
    assert blocks == pytest.approx(rows[-1]["val_bits_per_token"], rel=1e-6)
    assert blocks != json.loads(whole.read_text())["bits_per_token"]
    if not condition:  # the Python API takes the model's own path too
        trained = load_trained(evaluate[2])
        texts, _ = open_texts(trained, str(data))
        assert bits_per_token(trained.model, list(map(texts.ids, range(len(texts))))) == pytest.approx(blocks, rel=1e-6)
    generate = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "count", "--num_inference_steps", "3"]
    texts = []
    for path in ([], ["--block_size", "0"], ["--block_size", "1"]):
        assert main([*generate, *path, "--json", str(tmp_path / "texts.json")]) == 0
        texts.append(json.loads((tmp_path / "texts.json").read_text()))
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    ("path", "radix"),
    [([], 54), (["--model", "JiT-XS/2", "--token_size", 2, "--block_size", 1, "--noisy_depth", 1], 3)],
)
def test_real_vocabulary(path, radix, shared_tokenizers, corpus, tmp_path):
    """Digits where tokens share a patch, walks down the tree of colours where each has one; also cut up by ZeRO-3."""
    flags = [*path, "--tokenizer_path", shared_tokenizers / "qwen3", "--max_steps", 2]
    flags = small_flags(corpus, tmp_path / "run", *flags, *with_json(tmp_path, zero_optimization={"stage": 3}))
    printed = train_in_ranks(2, [*flags, "--num_samples", "1"])
    assert "vocab_size=151669" in printed and f"radix={radix}" in printed
    report = tmp_path / "report.json"
    checkpoint = ["--checkpoint", str(tmp_path / "run"), "--data_path", str(corpus)]
    assert main(["evaluate", *checkpoint, "--json", str(report)]) == 0
    figure = json.loads(report.read_text())["bits_per_token"]
    assert figure == pytest.approx(metrics(tmp_path / "run")[-1]["val_bits_per_token"], rel=1e-5)
    assert 10 < figure < 18  # log2(151669) is 17.2


def test_linear_head_with_the_reference_colours(corpus, tmp_path):
    """The reference system stays available as a baseline."""
    reference = ["--recipe", "reference", "--timesteps", "uniform"]
    train_in_ranks(1, small_flags(corpus, tmp_path / "run", *reference, "--max_steps", 2))
    assert metrics(tmp_path / "run")[-1]["val_bits_per_token"] > 50


def test_the_speed_that_is_logged_is_that_of_the_run(run):
    """Tokens, operations and seconds fit together, and little of the time is spent waiting for data."""
    for row in metrics(run[0])[1:]:
        tokens, seconds = row["valid_tokens_per_second"], row["step_seconds"]
        assert tokens * seconds == pytest.approx(row["valid_tokens"])
        # 6 operations a weight and patch of 16 tokens are what training costs at least.
        weights = sum(p.numel() for p in torch_blocks(run[0]).values())
        assert row["model_flops_per_second"] * seconds > 6 * weights * row["valid_tokens"] / 16
        assert 0 < row["peak_share"] < 1
        assert 0 <= row["data_wait"] < 0.5


def torch_blocks(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices of a run's blocks."""
    weights = load_file(folder / "checkpoints" / "step_00000008" / "model.safetensors")
    return {name: value for name, value in weights.items() if "blocks" in name and value.dim() == 2}


@pytest.mark.slow
def test_compiled_blocks_train_the_same(run, corpus, tmp_path):
    train_in_ranks(1, small_flags(corpus, tmp_path / "run", "--max_steps", 8, "--compile"), timeout=400)
    for compiled, plain in zip(metrics(tmp_path / "run"), metrics(run[0]), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    names = load_file(tmp_path / "run" / "checkpoints" / "step_00000008" / "model.safetensors").keys()
    assert names == load_file(run[0] / "checkpoints" / "step_00000008" / "model.safetensors").keys()


def test_compiling_without_a_compiler_is_a_users_mistake(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = train_config(small_flags(corpus, tmp_path / "run", "--compile"))
    with pytest.raises(UserError, match="no-such-compiler"):
        assemble(config, AloneOnCpu(), None)


class AloneOnCpu:
    """The only rank, without a process group."""

    device = torch.device("cpu")

    def on_first_rank(self, action):
        return action()


def test_a_run_never_writes_into_another(run, corpus):
    before = sorted(path.name for path in run[0].iterdir())
    with pytest.raises(AssertionError, match="already holds a run"):
        train_in_ranks(1, small_flags(corpus, run[0]))
    assert sorted(path.name for path in run[0].iterdir()) == before


def test_a_resumed_run_cannot_become_another(run):
    with pytest.raises(UserError, match=r"--model is 'JiT-S/4', the run has 'JiT-XS/4'"):
        train_config(["--resume", "--output_dir", str(run[0]), "--model", "JiT-S/4"])


def test_resuming_with_another_tokenizer_is_refused(run, tmp_path, shared_tokenizers):
    flags = ["--resume", "latest", "--output_dir", str(run[0]), "--tokenizer_path", str(shared_tokenizers / "smollm2")]
    with pytest.raises(AssertionError, match="is not the tokenizer"):
        train_in_ranks(1, flags)
