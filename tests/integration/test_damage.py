"""Broken and foreign files: one sentence that names the file, exit code 2, whatever is wrong with them; and checkpoints
under other names and in other places than their run's."""

import json
import pickle
import random
import shutil
import stat
from pathlib import Path

import pytest
import torch

from ds_tokimg import load
from ds_tokimg.__main__ import main
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.errors import UserError
from ds_tokimg.inference.loading import load_trained
from tests.support.damage import DAMAGES, Harmful, flip_a_bit, seal_again, strange_values
from tests.support.distributed import run_ranks
from tests.support.runs import metrics, small_flags, train_in_ranks, write_corpus

READ = {  # by whoever loads a model; what a checkpoint holds besides is for the run that goes on
    "checkpoint": [
        *("ema_0.9999.safetensors", "manifest.json", "model.json", "text.json", "trainer_state.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    ],
    "export": [
        *("manifest.json", "model.json", "model.safetensors", "text.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    ],
}
# A model without checksums is one of an earlier version; a wrong checksum may be that of a file that is not read.
HARMLESS = {("export", "manifest.json", "missing"), ("checkpoint", "manifest.json", "a bit flipped")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run of two steps, its checkpoint, an export of it, and the texts."""
    folder = tmp_path_factory.mktemp("made")
    corpus, run = write_corpus(folder), folder / "run"
    train_in_ranks(1, small_flags(corpus, run, "--timesteps", "entropic", "--max_steps", 2, "--save_interval", 1))
    checkpoint = checkpoints.find(run)
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(folder / "export")]) == 0
    return {"corpus": corpus, "run": run, "checkpoint": checkpoint, "export": folder / "export"}


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_trained(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in READ.items() for name in names])
def test_every_damage_to_every_file_is_one_sentence(kind, name, made, tmp_path):
    for number, (damage, harm) in enumerate(DAMAGES.items()):
        folder = shutil.copytree(made[kind], tmp_path / str(number))
        harm(folder / name)
        if (kind, name, damage) in HARMLESS:
            load_trained(str(folder))
            continue
        message = refused(folder)
        assert (str(folder) in message and "\n" not in message.strip()) or "cannot be used" in message, damage
        assert "Traceback" not in message and len(message) < 700, damage
        assert not (folder / "unpickled").exists() and not (folder / "tokenizer" / "unpickled").exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.json", "text.json", "trainer_state.json"])
def test_every_strange_value_is_refused_or_harmless(name, made, tmp_path):
    """Also where the manifest agrees with it. Nothing but a UserError comes out of loading."""
    folder = shutil.copytree(made["checkpoint"], tmp_path / "checkpoint")
    cases = list(strange_values(json.loads((folder / name).read_text())))
    refusals = 0
    for where, changed in random.Random(0).sample(cases, 80):
        (folder / name).write_text(json.dumps(changed))
        seal_again(folder)
        try:
            load_trained(str(folder))
        except UserError as mistake:
            refusals += 1
            assert name in str(mistake) or "safetensors" in str(mistake) or "tokenizer" in str(mistake), where
    assert refusals > 5


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_commands_end_with_one_sentence_and_exit_code_2(kind, made, tmp_path, capsys):
    folder = shutil.copytree(made[kind], tmp_path / "broken")
    flip_a_bit(folder / ("ema_0.9999.safetensors" if kind == "checkpoint" else "model.safetensors"))
    for command in (
        ["evaluate", "--checkpoint", folder, "--data_path", made["corpus"]],
        ["generate", "--checkpoint", folder],
        ["export", "--checkpoint", folder, "--output", tmp_path / "exported"],
    ):
        assert main(list(map(str, command))) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {folder} is damaged: ") and printed.count("\n") == 1
    assert not (tmp_path / "exported").exists()
    with pytest.raises(UserError, match="its checksum differs"):
        load(folder)


# ---- a run that goes on, or starts from, broken files ----

RESUMED = ["trainer_state.json", "rng.pt", "mp_rank_00_model_states.pt", "model.json", "tokenizer/tokenizer.json"]


def _outcomes(dist, cases: list[list[str]]) -> list[str]:
    """What becomes of `train` with each list of flags: a UserError's message, or what else was raised."""
    from ds_tokimg.model import config as shapes
    from ds_tokimg.settings import engine_json
    from ds_tokimg.settings.command_line import train_config
    from ds_tokimg.training.run import train

    shapes.SIZES["XS"] = (2, 32, 2)
    outcomes = []
    for flags in cases:
        try:
            config = train_config(flags)
            train(config, engine_json.read(config.deepspeed_config), dist)
            outcomes.append("trained")
        except UserError as mistake:
            outcomes.append(str(mistake))
        except Exception as error:
            outcomes.append(f"TRACEBACK {type(error).__name__}: {error}")
    return outcomes


def test_no_damage_to_a_checkpoint_breaks_a_resume(made, tmp_path):
    """What the checksums tell, and what they cannot tell as they were made again."""
    cases, names = [], []
    for name in RESUMED:
        for damage in ("cut", "a list", "deep", "a pickle", "an empty object", "a link to itself"):
            for sealed in (False, True):
                run = tmp_path / f"run{len(cases)}"
                checkpoint = shutil.copytree(made["checkpoint"], run / "checkpoints" / made["checkpoint"].name)
                for file in ("config.json", "ds_config_given.json"):
                    shutil.copy(made["run"] / file, run)
                DAMAGES[damage](checkpoint / name)
                if sealed:
                    seal_again(checkpoint)
                cases.append(["--resume", str(checkpoint), "--max_steps", "3"])
                names.append((name, damage, sealed))
    for name, outcome in zip(names, run_ranks(1, _outcomes, cases)[0], strict=True):
        assert not outcome.startswith(("TRACEBACK", "trained")), (name, outcome)
        assert "step_00000002" in outcome and outcome.count("\n") < 4, (name, outcome)
    assert not list(tmp_path.rglob("unpickled"))


def test_broken_settings_of_a_run_are_named(made, tmp_path):
    cases = []
    for damage in DAMAGES:
        for name in ("config.json", "ds_config_given.json"):
            run = tmp_path / f"{len(cases)}"
            shutil.copytree(made["run"], run)
            DAMAGES[damage](run / name)
            cases.append((run, name, damage, ["--resume", "latest", "--output_dir", str(run), "--max_steps", "2"]))
    outcomes = run_ranks(1, _outcomes, [flags for *_, flags in cases])[0]
    for (_, name, damage, _), outcome in zip(cases, outcomes, strict=True):
        assert not outcome.startswith("TRACEBACK"), (name, damage, outcome)


def test_broken_models_are_nothing_to_start_from(made, tmp_path):
    cases = []
    for name in READ["export"]:
        for damage in ("cut", "a list", "deep", "a pickle", "a link to another file"):
            folder = shutil.copytree(made["export"], tmp_path / f"export{len(cases)}")
            DAMAGES[damage](folder / name)
            cases.append(small_flags(made["corpus"], tmp_path / f"run{len(cases)}", "--init_from", folder))
    for outcome in run_ranks(1, _outcomes, cases)[0]:
        assert not outcome.startswith(("TRACEBACK", "trained")) and "export" in outcome, outcome


@pytest.mark.parametrize(
    "content", [b"../../elsewhere", b"/etc", b"", b"\xff\xfe", b"step_00000002/../../x", b"[]" * 10_000, b"step_x"]
)
@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_broken_pointer_gives_way_to_the_newest(pointer, content, made, tmp_path, caplog):
    run = shutil.copytree(made["run"], tmp_path / "run")
    (run / "checkpoints" / pointer).write_bytes(content)
    assert checkpoints.find(run, pointer) == run / "checkpoints" / made["checkpoint"].name
    assert "names no checkpoint" in caplog.text


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside"])
def test_a_manifest_cannot_lead_out_of_its_folder(name, made, tmp_path):
    folder = shutil.copytree(made["export"], tmp_path / "export")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "crc32": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "is a file outside of the folder" in refused(folder)


def test_code_is_refused_by_its_name(made, tmp_path):
    """In the engine's files and in that of the generators, as torch writes it and as a bare pickle."""
    cases, paths = [], []
    for name in ("rng.pt", "mp_rank_00_model_states.pt"):
        for bare in (False, True):
            run = shutil.copytree(made["run"], tmp_path / f"run{len(cases)}")
            path = checkpoints.find(run) / name
            harmful = Harmful(tmp_path / "unpickled")
            path.write_bytes(pickle.dumps(harmful)) if bare else torch.save({"module": harmful}, path)
            seal_again(path.parent)
            paths.append(path)
            cases.append(["--resume", "latest", "--output_dir", str(run), "--max_steps", "3"])
    outcomes = run_ranks(1, _outcomes, cases)[0]
    for path, outcome in zip(paths, outcomes, strict=True):
        assert outcome.startswith(f"{path}: ") and "\n" not in outcome
    assert sum("holds something else than tensors" in outcome and "mkdir" in outcome for outcome in outcomes) >= 2
    assert not (tmp_path / "unpickled").exists()


# ---- other names and places ----


def test_checkpoints_by_other_names_and_in_other_places(made, tmp_path, monkeypatch):
    """`.`, the bare name, a link, and a copy far from its run: loaded, and gone on from."""
    run = shutil.copytree(made["run"], tmp_path / "run")
    name = made["checkpoint"].name
    expected = load_trained(str(made["checkpoint"])).model.state_dict()
    (tmp_path / "link").symlink_to(run / "checkpoints" / name)
    copied = shutil.copytree(run / "checkpoints" / name, tmp_path / "copied")
    for place, path in ((run / "checkpoints", name), (run / "checkpoints" / name, "."), (tmp_path, "link")):
        monkeypatch.chdir(place)
        assert all(value.equal(expected[key]) for key, value in load_trained(path).model.state_dict().items())
    monkeypatch.chdir(tmp_path)
    assert load_trained("copied").tokenizer.get_vocab() == load_trained(str(run)).tokenizer.get_vocab()
    monkeypatch.chdir(run / "checkpoints" / name)
    again = tmp_path / "again"
    cases = [
        ["--resume", ".", "--max_steps", "3"],
        ["--resume", str(copied), "--max_steps", "3"],
        ["--resume", str(copied), "--max_steps", "3", "--output_dir", str(again)],
        ["--resume", str(tmp_path / "link"), "--max_steps", "3"],
    ]
    first, second, third, fourth = run_ranks(1, _outcomes, cases)[0]
    assert first == third == fourth == "trained"
    assert "is a checkpoint outside of its run: name a folder to go on in" in second
    rows, others = metrics(run)[-1], metrics(again)[-1]
    assert (rows["step"], rows["loss"], rows["grad_norm"]) == (others["step"], others["loss"], others["grad_norm"])


def test_a_tokenizer_is_never_looked_for_on_the_hub(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made["checkpoint"], tmp_path / "checkpoints" / "copied")
    shutil.rmtree(folder / "tokenizer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", lambda *args, **options: pytest.fail("asked the hub"))
    assert "copy tokenizer/ of its run into it" in refused(Path("checkpoints/copied"))
    shutil.copytree(made["run"] / "tokenizer", tmp_path / "tokenizer")  # as earlier versions had it
    monkeypatch.chdir(folder)
    assert "is damaged: tokenizer/tokenizer.json is missing" in refused(Path("."))


def test_a_checkpoint_that_cannot_be_written_to_is_converted_elsewhere(made, tmp_path):
    """One rank's checkpoint, gone on from by two: nothing is made beside it, not even for a moment."""
    copied = shutil.copytree(made["checkpoint"], tmp_path / "archive" / made["checkpoint"].name)
    for folder in (copied.parent, copied):
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = copied.parent.stat().st_mtime_ns
    flags = ["--resume", str(copied), "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    stage = tmp_path / "stage.json"
    content = json.loads((made["run"] / "ds_config_given.json").read_text())
    content["zero_optimization"] = {"stage": 1}
    stage.write_text(json.dumps(content))
    printed = train_in_ranks(2, [*flags, "--deepspeed_config", str(stage)])
    assert "resumed" in printed and copied.parent.stat().st_mtime_ns == before
    assert metrics(tmp_path / "run")[-1]["step"] == 3
    copied.parent.chmod(0o700)
    copied.chmod(0o700)
