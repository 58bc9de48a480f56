"""generate: what each flag does, says or is refused for, by kind of model; what is printed and written, and when."""

import json
import os
import re
import stat

import pytest

from ds_tokimg import load
from ds_tokimg.__main__ import main
from ds_tokimg.commands.flags import answers_prompts
from ds_tokimg.inference import texts
from tests.support.exports import write_export

KINDS = {
    "at-once": {},
    "blocks": {"block_size": 1},
    "one-step": {"block_size": 1, "patch_size": 2, "token_size": 2},
    "linear": {"head": "linear"},
    "answers": {"enable_condition": True, "block_size": 1},
    "answers-once": {"enable_condition": True},
}
UNCONDITIONAL = ("at-once", "blocks", "one-step", "linear")
LEFT_TO_RIGHT = ("blocks", "one-step", "answers")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {kind: write_export(folder / kind, **shape) for kind, shape in KINDS.items()}


def generate(exports, kind: str, *flags) -> int:
    quick = [] if "--num_inference_steps" in flags or kind == "one-step" else ["--num_inference_steps", "2"]
    words = ["--checkpoint", exports[kind], "--device", "cpu", *quick, *flags]
    return main(["generate", *map(str, words)])


# ---- every flag by every kind of model ----

# flags: {kind: what is said on stderr}; "error: " in front where it is refused. A kind that is not named: it does what
# it says, and no note is printed.
SPOKEN = [
    (["--prompt", "the cat"], {}),
    (["--temperature", "0.7"], {"linear": "error: temperature, top_k and top_p reshape"}),
    (["--top_k", "5"], {"linear": "error: temperature, top_k and top_p reshape"}),
    (["--top_p", "0.5"], {"linear": "error: temperature, top_k and top_p reshape"}),
    (["--temperature", "1", "--top_p", "1"], {}),
    (["--temperature", "0.7", "--sampler", "euler"], dict.fromkeys(KINDS, "error: --temperature, top_k and top_p")),
    (["--stop", "a"], {}),
    (["--seed", "3"], {}),
    (["--num_samples", "2", "--batch_size", "1"], {}),
    (["--max_new_tokens", "3"], {}),
    (
        ["--max_new_tokens", "70"],
        dict.fromkeys(UNCONDITIONAL, "an image holds 64 tokens: a text that is longer goes on in another")
        | dict.fromkeys(["answers", "answers-once"], "answers had at most 32 tokens in training"),
    ),
    (["--num_inference_steps", "4"], {"one-step": "one step draws the tokens of this model exactly: 4 take longer"}),
    (["--num_inference_steps", "1"], {}),
    (["--num_inference_steps", "3", "--sampler", "heun"], dict.fromkeys(KINDS, "heun evaluates the network twice")),
    (["--eta", "1"], {"one-step": "eta has no effect in a single step"}),
    (["--eta", "3", "--sampler", "euler"], dict.fromkeys(KINDS, "error: eta is how much noise the sampler ancestral")),
    (
        ["--block_size", "2"],
        dict.fromkeys(LEFT_TO_RIGHT, "trained to write blocks of 1 patch(es) from left to right, not blocks of 2")
        | dict.fromkeys(["at-once", "linear", "answers-once"], "trained to write the whole image at once, not blocks"),
    ),
    (["--block_size", "0"], dict.fromkeys(LEFT_TO_RIGHT, "from left to right, not the whole image at once")),
    (["--guidance_scale", "1"], {}),
    (
        ["--prompt", "the cat", "--guidance_scale", "2"],
        dict.fromkeys(UNCONDITIONAL, "error: guidance_scale is 2, but this model was trained without conditions"),
    ),
    (
        ["--guidance_scale", "2"],
        dict.fromkeys(UNCONDITIONAL, "error: guidance_scale is 2, but this model was trained without")
        | dict.fromkeys(["answers", "answers-once"], "error: guidance_scale is 2, but there is no prompt to follow"),
    ),
    (
        ["--infill", "the <gap:3> sat"],
        dict.fromkeys(["answers", "answers-once"], "error: this model was trained with --enable_condition")
        | dict.fromkeys(["blocks", "one-step"], "a gap is filled from what stands before it"),
    ),
    (["--stream"], dict.fromkeys(["at-once", "linear", "answers-once"], "its text comes in one piece")),
    (["--weights", "trained"], dict.fromkeys(KINDS, "an export has one set of weights")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("flags", "spoken"), SPOKEN, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_nothing_is_ignored_without_a_word(flags, spoken, kind, exports, capsys):
    quick = [] if "--max_new_tokens" in flags or "--infill" in flags else ["--max_new_tokens", "6"]
    code = generate(exports, kind, *flags, *quick)
    printed = capsys.readouterr()
    expected = spoken.get(kind)
    if expected is not None and expected.startswith("error: "):
        assert code == 2 and printed.err.startswith(expected) and printed.err.count("\n") == 1 and not printed.out
        return
    said = [
        line for line in printed.err.splitlines() if not re.search(r"tokens per second$|colours were no token", line)
    ]
    assert code == 0 and printed.out.startswith("[0]")
    assert len(said) == (expected is not None), said
    assert expected is None or (said[0].startswith("note: ") and expected in said[0])


TOGETHER = [
    (["--prompt", "a", "--prompt_file", "FILE"], "--prompt_file and --prompt do not go together"),
    (["--infill", "a <gap:2>", "--prompt", "a"], "--infill and --prompt do not"),
    (["--infill", "a <gap:2>", "--prompt_file", "FILE"], "--infill and --prompt_file do not"),
    (["--infill", "a <gap:2>", "--max_new_tokens", "0"], "--infill and --max_new_tokens do not"),
    (["--infill", "a <gap:2>", "--stop", "x"], "--infill and --stop do not"),
    (["--infill", "a <gap:2>", "--stream"], "--infill and --stream do not"),
    (["--stream", "--animate", "x.gif", "--batch_size", "4"], "--stream and --animate, --batch_size do not"),
    (["--num_samples", "0"], "--num_samples is 0"),
    (["--batch_size", "0"], "--batch_size is 0"),
    (["--max_new_tokens", "-1"], "--max_new_tokens is -1"),
    (["--num_inference_steps", "0"], "--num_inference_steps is 0"),
    (["--block_size", "-1"], "--block_size is -1"),
    (["--eta", "-1"], "--eta is -1.0"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--temperature", "hot"], "argument --temperature: invalid float value"),
    (["--top_k", "2.5"], "argument --top_k: invalid int value"),
    (["--top_k", "0"], "--top_k is 0"),
    (["--top_p", "0"], "--top_p is 0.0"),
    (["--guidance_scale", "inf"], "--guidance_scale is inf"),
    (["--stop", ""], "--stop: is empty"),
    (["--prompt", "\udcff"], "is not UTF-8"),
    (["--prompt_file", "EMPTY"], "no prompt in it"),
    (["--animate", "x.mp4"], "must end with .gif"),
    (["--animate", "no/where.gif"], "--animate no/where.gif cannot be written: there is no folder no"),
    (["--json", "no/where.json"], "--json no/where.json cannot be written: there is no folder no"),
    (["--json", "."], "--json . cannot be written"),
    (["--save_images", "FILE"], "--save_images FILE cannot be written: "),
    (["--save_images", "/proc/pictures"], "--save_images /proc/pictures cannot be written"),
]


@pytest.mark.parametrize(
    ("flags", "message"),
    TOGETHER,
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("the cat\n")
    (tmp_path / "EMPTY").write_text("")
    assert main(["generate", "--checkpoint", "not_looked_at", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["EMPTY", "FILE"]


# ---- what is printed and written ----


@pytest.mark.parametrize("kind", ["answers", "answers-once"])
def test_an_answer_longer_than_an_image_is_refused(kind, exports, capsys):
    assert generate(exports, kind, "--prompt", "the cat", "--max_new_tokens", 300) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: max_new_tokens is 300; an answer has one image") and not printed.out


def test_texts_speed_and_json(exports, tmp_path, capsys):
    flags = ["--prompt", "the cat", "--num_samples", 3, "--max_new_tokens", 20, "--seed", 5, "--top_k", 30]
    assert generate(exports, "blocks", *flags, "--stop", "no such", "--json", tmp_path / "texts.json") == 0
    printed = capsys.readouterr()
    content = (tmp_path / "texts.json").read_text()
    rows = json.loads(content)
    assert [row["index"] for row in rows] == [0, 1, 2]
    shown = [
        f"[{n}] 'the cat' -> ({row['num_tokens']} tokens, {row['finish_reason']}) {row['text']}"
        for n, row in enumerate(rows)
    ]
    tokens = sum(row["num_tokens"] for row in rows)
    assert printed.out == "".join(f"{line}\n" for line in shown)
    assert re.fullmatch(
        rf"3 texts, {tokens} tokens in [\d.]+ s: [\d,.]+ tokens per second\nwritten: .*/texts.json\n", printed.err
    )
    lm = load(exports["blocks"], device="cpu")
    again = lm.generate(["the cat"] * 3, 20, seed=5, top_k=30, num_inference_steps=2)
    for row, text in zip(rows, again, strict=True):
        assert {key: row[key] for key in text} == text and len(row["token_ids"]) == row["num_tokens"]
        assert row["checkpoint"] == str(exports["blocks"].resolve()) and row["seed"] == 5
        assert row["settings"]["top_k"] == 30 and row["settings"]["stop"] == ["no such"]
        assert row["settings"]["num_inference_steps"] == 2 and row["settings"]["sampler"] == "ancestral"
    assert content.count('"token_ids": [') == 3 and all(
        line.endswith("],") for line in content.splitlines() if "token_ids" in line
    )


def test_a_stream_shows_the_same_texts(exports, tmp_path, capsys):
    flags = ["--num_samples", 2, "--max_new_tokens", 20, "--stop", "e"]
    files = [tmp_path / "whole.json", tmp_path / "stream.json"]
    assert generate(exports, "blocks", *flags, "--json", files[0]) == 0
    capsys.readouterr()
    assert generate(exports, "blocks", *flags, "--stream", "--json", files[1]) == 0
    rows = json.loads(files[0].read_text())
    assert json.loads(files[1].read_text()) == rows
    lines = [f"[{n}] {row['text']} ({row['num_tokens']} tokens, {row['finish_reason']})" for n, row in enumerate(rows)]
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines)


def test_a_text_is_printed_before_its_files_and_one_that_fails_keeps_none_from_the_others(
    exports, tmp_path, monkeypatch, capsys
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(texts, "save_images", full)
    files = ["--save_images", tmp_path / "pictures", "--json", tmp_path / "texts.json"]
    assert generate(exports, "blocks", "--max_new_tokens", 6, *files) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("[0] (6 tokens") and "No space left on device" in printed.err
    assert json.loads((tmp_path / "texts.json").read_text())[0]["num_tokens"] == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("flag", ["--json", "--save_images", "--animate"])
def test_a_folder_that_is_closed_is_noticed_first(flag, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    name = {"--json": "x.json", "--save_images": "x", "--animate": "x.gif"}[flag]
    assert main(["generate", "--checkpoint", "not_looked_at", flag, str(closed / name)]) == 2
    assert f"{flag} {closed / name} cannot be written: Permission denied" in capsys.readouterr().err


def test_what_was_in_a_file_stays_until_there_is_something_to_write(exports, tmp_path, capsys):
    file = tmp_path / "texts.json"
    file.write_text("before")
    assert generate(exports, "linear", "--top_k", 3, "--json", file) == 2
    assert file.read_text() == "before"


def test_an_animation_shows_a_prompt_from_left_to_right(exports, tmp_path):
    from PIL import Image

    file = tmp_path / "text.gif"
    prompt = "the old house by the sea where it slept"
    assert generate(exports, "blocks", "--prompt", prompt, "--max_new_tokens", 20, "--animate", file) == 0
    with Image.open(file) as picture:
        assert picture.n_frames > 2
    assert file.with_suffix(".png").is_file()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_model_without_conditions_is_told_before_weights_are_read(command, tmp_path, capsys):
    """Weights that cannot be read are not what is told."""
    folder = write_export(tmp_path / "export")
    (folder / "model.safetensors").write_bytes(b"")
    flags = ["--prompt", "the cat", "--guidance_scale", "2"] if command == "generate" else []
    assert main([command, "--checkpoint", str(folder), *flags]) == 2
    told = capsys.readouterr().err
    assert "trained without" in told and "starting" not in told


@pytest.mark.parametrize("content", ["{", "{}", '{"enable_condition": 1}'])
def test_a_folder_that_does_not_say_is_left_to_loading(content, tmp_path):
    (tmp_path / "text.json").write_text(content)
    assert answers_prompts(str(tmp_path)) is None


def test_the_folder_of_a_run_says_whether_it_answers(tmp_path):
    assert answers_prompts(str(tmp_path)) is None
    for answers in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"enable_condition": answers}))
        assert answers_prompts(str(tmp_path)) is answers


def test_numbers_of_evaluate_are_told_together_and_first(capsys):
    numbers = ["--noise_levels", "0", "--block_size", "-1"]
    assert main(["evaluate", "--checkpoint", "none", "--data_path", "none.txt", *numbers]) == 2
    told = capsys.readouterr().err
    assert "--noise_levels 0: at least 1" in told and "--block_size -1: at least 0" in told


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_mistakes_in_how_texts_are_drawn_are_told_together(command, capsys):
    wrong = ["--temperature", "-1", "--top_k", "0", "--top_p", "2", "--max_new_tokens", "0"]
    assert main([command, "--checkpoint", "none", *wrong]) == 2
    told = capsys.readouterr().err.removeprefix("error: ").splitlines()
    assert [line.split()[0] for line in told] == wrong[::2]
