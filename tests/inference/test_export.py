"""An export for others: what its card says, what its files do not say, who can read them, how it gets to the hub."""

import json
import os
import re
import shutil
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from ds_tokimg import UserError, choices, load
from ds_tokimg.__main__ import main
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.settings import formats
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.settings.manifest import files_in
from ds_tokimg.tokens.tokenizer import train_tokenizer
from tests.support.damage import flip_a_bit
from tests.support.exports import write_export
from tests.support.runs import metrics, small_flags, train_in_ranks, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps with a validation at the last one, exported by somebody who lets his group read."""
    folder = tmp_path_factory.mktemp("secret_place")
    train_in_ranks(1, small_flags(write_corpus(folder), folder / "run", "--cache_dir", folder / "cache"))
    before = os.umask(0o027)
    try:
        command = ["export", "--checkpoint", str(folder / "run"), "--output", str(folder / "my-model")]
        assert main([*command, "--license", "mit"]) == 0
    finally:
        os.umask(before)
    return folder


def card_of(folder: Path) -> tuple[dict, str]:
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_has_what_is_known(run):
    front, text = card_of(run / "my-model")
    row = metrics(run / "run")[-1]
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == ("mit", "ds_tokimg", "text-generation")
    values = {metric["type"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert values["bits_per_token"] == pytest.approx(row["val_bits_per_token"], abs=1e-4)
    assert values["bits_per_byte"] == pytest.approx(row["val_bits_per_byte"], abs=1e-4)
    assert f"{row['val_bits_per_token']:.4f} ± " in text and "for these weights" in text
    assert "`corpus.txt`" in text and "| recipe | at-once |" in text and "| training | 4 optimiser steps |" in text
    assert 'lm = load("my-model")' in text
    results = ModelCard.load(run / "my-model" / "README.md").data.eval_results  # as the hub reads it
    assert {result.metric_type: result.metric_value for result in results} == values


def test_the_error_is_that_of_the_validation(run, tmp_path):
    """What the card says is what `evaluate` measures on the same texts."""
    figures = tmp_path / "figures.json"
    command = ["evaluate", "--checkpoint", str(run / "my-model"), "--data_path", str(run / "corpus.txt")]
    assert main([*command, "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    value, spread = re.search(r"([\d.]+) ± ([\d.]+)", card_of(run / "my-model")[1]).groups()
    assert float(value) == pytest.approx(measured["bits_per_token"], abs=1e-4)
    assert float(spread) == pytest.approx(1.96 * measured["standard_error"], abs=1e-4)


def test_a_licence_is_left_to_be_filled_in(tmp_path, capsys):
    assert main(["export", "--checkpoint", str(write_export(tmp_path / "a")), "--output", str(tmp_path / "b")]) == 0
    assert "its licence is not filled in" in capsys.readouterr().out
    front, text = card_of(tmp_path / "b")
    assert front["license"] == "unknown" and "to fill in" in text and "No figures are stored" in text
    assert "model-index" not in front
    command = ["export", "--checkpoint", str(tmp_path / "a"), "--output", str(tmp_path / "c")]
    assert main([*command, "--license", "mit\nx: y"]) == 2 and not (tmp_path / "c").exists()


def test_no_file_says_where_it_was_made(run):
    files = [path for path in (run / "my-model").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "config.json", "manifest.json", "model.json", "text.json"}
    for path in files:
        assert b"secret_place" not in path.read_bytes(), path
    assert formats.read(run / "my-model" / "text.json", formats.TEXT)["data_path"] == ["corpus.txt"]


def test_an_export_knows_its_held_out_texts_by_the_name_of_their_file(run, tmp_path, capsys):
    """On another machine, too, the texts that a model was trained on are not what it is measured on."""
    elsewhere = tmp_path / "corpus.txt"
    elsewhere.write_bytes((run / "corpus.txt").read_bytes())
    counted = []
    for path in (run / "corpus.txt", elsewhere):
        assert main(["evaluate", "--checkpoint", str(run / "my-model"), "--data_path", str(path)]) == 0
        counted.append(re.search(r": (\d+ images, [\d,]+ tokens)", capsys.readouterr().out)[1])
    assert counted[0] == counted[1] and int(counted[0].split()[0]) < 20


def test_files_are_for_those_whom_the_umask_allows(run):
    umask = os.umask(0o022)
    os.umask(umask)
    for place, mask in ((run / "run", umask), (run / "cache", umask), (run / "my-model", 0o027)):
        for path in (place, *place.rglob("*")):
            if path.suffix == ".lock":
                continue  # for the trainer alone
            expected = (0o777 if path.is_dir() else 0o666) & ~mask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_exports_without_checksums_are_those_of_earlier_versions(run, tmp_path):
    folder = write_export(tmp_path / "old")
    assert not (folder / "manifest.json").exists()
    assert load(folder, device="cpu")("the", 4) == load(folder, device="cpu")("the", 4)


def test_another_models_weights_with_a_checksum_of_their_own_are_still_refused(run, tmp_path):
    folder = shutil.copytree(run / "my-model", tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first][:1].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="these are the weights of another model"):
        load(folder, device="cpu")
    shutil.copyfile(run / "my-model" / "model.safetensors", folder / "model.safetensors")
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match="its checksum differs"):
        load(folder, device="cpu")


# ---- the hub ----


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files needs. Keeps what it was sent."""

    requests: list[tuple[str, str, bytes]]

    def do_GET(self):
        if self.server.refuse:
            return self._answer({"error": "Repository not found"}, 404)
        return self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)) if "Content-Length" in self.headers else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.seen.append((self.path, self.headers.get("Authorization", ""), body))
        if self.path == "/api/repos/create":
            if self.server.refuse:
                return self._answer({"error": "You don't have the rights"}, 403)
            return self._answer({"url": f"{self.server.address}/me/model", "name": "me/model"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._answer({"files": modes})
        where = f"{self.server.address}/me/model/commit/0"
        return self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": where})

    def _answer(self, value, code=200):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """No lines between those of the tests."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.seen, server.refuse = f"http://127.0.0.1:{server.server_port}", [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    yield server
    server.shutdown()
    server.server_close()


def push(folder: Path, output: Path) -> int:
    return main(["export", "--checkpoint", str(folder), "--output", str(output), "--push_to_hub", "me/model"])


def test_an_export_goes_to_the_hub(hub, tmp_path, capsys):
    assert push(write_export(tmp_path / "a"), tmp_path / "b") == 0
    assert "pushed to" in capsys.readouterr().out
    made = json.loads(next(body for path, _, body in hub.seen if path == "/api/repos/create"))
    assert made["name"] == "model" and (made.get("private") or made.get("visibility") == "private")
    [commit] = [body for path, _, body in hub.seen if "/commit/" in path]
    sent = {json.loads(line)["value"].get("path") for line in commit.splitlines()}
    assert set(files_in(tmp_path / "b")) <= sent
    assert {authorization for _, authorization, _ in hub.seen} == {"Bearer hf_dummy"}
    assert 'load("me/model")' in card_of(tmp_path / "b")[1]


def test_what_the_hub_says_no_to_is_one_sentence(hub, tmp_path, capsys):
    hub.refuse = True
    assert push(write_export(tmp_path / "a"), tmp_path / "b") == 2
    printed = capsys.readouterr().err
    assert "error: --push_to_hub me/model: " in printed and printed.count("\n") == 1
    assert (tmp_path / "b" / "model.safetensors").is_file()


def test_without_a_network_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    assert push(write_export(tmp_path / "a"), tmp_path / "b") == 2
    printed = capsys.readouterr().err
    assert "error: --push_to_hub me/model: " in printed and printed.count("\n") == 1


# ---- to start from ----


@pytest.mark.parametrize("kind", ["export", "run", "checkpoint"])
def test_fine_tuning_needs_no_other_flag_than_data(kind, run, tmp_path):
    source = {"export": run / "my-model", "run": run / "run", "checkpoint": checkpoints.find(run / "run")}[kind]
    flags = ["--data_path", run / "corpus.txt", "--init_from", source, "--output_dir", tmp_path / "tuned"]
    train_in_ranks(1, [*map(str, flags), "--max_steps", "1", "--num_samples", "0", "--train_batch_size", "8"])
    before, after = load(source, device="cpu").trained, load(tmp_path / "tuned", device="cpu").trained
    assert after.model.config == before.model.config and after.model.writing == before.model.writing
    assert after.model.codec.to_dict() == before.model.codec.to_dict()
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()


def test_all_contradictions_at_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(choices.SIZES, "XS", (2, 32, 2))
    train_tokenizer(["other words entirely"] * 10, 280).save_pretrained(tmp_path / "other")
    plan = ["plan", "--data_path", str(run / "corpus.txt"), "--init_from", str(run / "my-model")]
    assert main(plan) == 0
    wrong = ["--model", "JiT-S/2", "--token_size", "2", "--palette", "id", "--tokenizer_path", str(tmp_path / "other")]
    assert main([*plan, *wrong]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --init_from {run / 'my-model'} decides these: leave the flags out")
    problems = [line.split()[1] for line in message.splitlines()[1:]]
    assert problems == ["--model", "--token_size", "--palette", "--tokenizer_path"]
    assert "--model is 'JiT-S/2', the model has 'JiT-XS/4'" in message


def test_an_export_of_an_earlier_version_gives_its_shape_too(tmp_path, monkeypatch):
    """Without config.json: what it does not say follows from the recipe that it is most like."""
    monkeypatch.setitem(choices.SIZES, "XS", (2, 32, 2))
    folder = write_export(tmp_path / "old", block_size=1, noisy_depth=1)
    config = train_config(["--data_path", "x", "--init_from", str(folder)])
    assert (config.model, config.img_size, config.block_size, config.noisy_depth) == ("JiT-XS/4", 16, 1, 1)
    assert config.recipe == "left-to-right" and config.timesteps == "band" and config.vocab_size == 280
    with pytest.raises(UserError, match="no size of --model has its 2 layers, 48 wide"):
        train_config(["--data_path", "x", "--init_from", str(write_export(tmp_path / "odd", width=48))])
