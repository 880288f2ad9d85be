"""The scripts of `examples` that train and use language models, at small size on real text, as a user would start them.

They run in processes that are forked from one that has imported what they import. There the name `deepspeed` is
zeroxide's, as under `zeroxide run`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from forking import ForkServer
from programs import PACKAGE

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
IMPORTS = (
    # First, so that the others find the name.
    "zeroxide.integrations.deepspeed",
    *("transformers.trainer_seq2seq", "trl.trainer.sft_trainer", "peft", "datasets"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "t5")),
)
CLOSE = 2e-6
"""Of losses beside Trainer's own: see `test_trainer.py`."""
NEW = re.compile(r"newly initialized|MISSING|UNEXPECTED")
"""What transformers says of a folder that does not have a model's weights."""


class Scripts:
    """Starts scripts of `examples` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        modules = [str(PACKAGE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(modules),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # Arrow's own allocator starts a thread, and what has threads is not forked.
        known = {
            "PYTHONPATH": self.env["PYTHONPATH"],
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            "HF_HUB_OFFLINE": "1",
        }
        self._server = ForkServer(IMPORTS, env=known)

    def start(self, script: str, *args: object, **env: str):
        """The process, and the files of its output."""
        number = len(list(self.folder.glob("*.out")))
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        return self._server.fork(EXAMPLES / script, list(map(str, args)), self.env | env, out, err), out, err

    def run(self, script: str, *args: object, **env: str) -> str:
        """What it prints, without what others print of how far they are. Its end is 0, and no weight is missing."""
        process, out, err = self.start(script, *args, **env)
        try:
            code = process.wait(250)
        finally:
            process.kill()
        assert code == 0, err.read_text()[-6000:]
        assert not NEW.search(err.read_text())
        return out.read_text()

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        # Forked processes are where their parent is, and scripts and configs write below there.
        patch.chdir(folder)
        made = Scripts(folder)
    yield made
    made.close()


def numbers(shown: str, pattern: str) -> list[float]:
    """Those that the pattern finds in the last line that has them."""
    found = re.findall(pattern, shown)
    assert found, shown[-2000:]
    return [*map(float, found[-1] if isinstance(found[-1], tuple) else found[-1:])]


@pytest.fixture(scope="module")
def pretrained(scripts):
    """(folder, what was printed) of a small Llama that has read the sources of Python's email package."""
    email = Path(__import__("email").__file__).parent
    sizes = ["--width", 64, "--layers", 2, "--vocabulary", 512, "--length", 64]
    args = ["--text", email, *sizes, "--steps", 40, "--rate", 3e-3, "--save-every", 30, "--out", scripts.folder / "p"]
    return args, scripts.run("pretrain.py", *args)


def test_pretraining(scripts, pretrained):
    """Catches: a step that is seen again or left out when training goes on, a schedule that begins anew."""
    args, shown = pretrained
    losses = dict(re.findall(r"step (\d+) loss (\S+)", shown))
    assert len(losses) == 40
    assert float(losses["1"]) == pytest.approx(math.log(512), rel=0.02)
    assert float(losses["40"]) < 0.93 * math.log(512)
    # Ended between the last checkpoint and the last step, as by a signal.
    saved = scripts.folder / "p/checkpoints"
    shutil.rmtree(saved / "global_step40")
    (saved / "latest").write_text("global_step30")
    again = dict(re.findall(r"step (\d+) loss (\S+)", scripts.run("pretrain.py", *args)))
    assert again == {step: loss for step, loss in losses.items() if int(step) > 30}


HELD_OUT = r"held-out loss: (\S+) before, (\S+) after"


def test_fine_tuning_with_trainer(scripts, pretrained):
    """`zeroxide run` itself, beside Trainer alone. Catches: a config that Trainer does not take, weights that are not
    the folder's, other losses."""
    args = ["--model", scripts.folder / "p/model", "--length", 64, "--steps", 16, "--rate", 1e-3]
    alone = numbers(scripts.run("finetune_trainer.py", *args, "--out", scripts.folder / "f0"), HELD_OUT)
    command = [sys.executable, "-m", "zeroxide.cli", "run", EXAMPLES / "finetune_trainer.py", *args]
    config = ["--deepspeed", EXAMPLES / "ds_config_zero3_nvme.json", "--out", scripts.folder / "f1"]
    ended = subprocess.run(
        [*map(str, command), *map(str, config)],
        env=scripts.env,
        cwd=scripts.folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    before, after = numbers(ended.stdout, HELD_OUT)
    assert [before, after] == pytest.approx(alone, rel=CLOSE)
    # Better than knowing nothing from the start, and better still at the end.
    assert after < before - 0.05 < math.log(512) - 0.2
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        each.name for each in (scripts.folder / "f1/model").iterdir()
    }


def test_classification(scripts):
    """Beside Trainer alone. By chance the accuracy of n texts of k packages has a deviation of sqrt((k - 1) / n) / k:
    five of them are no chance. Catches: labels that do not go with texts, a best model that is not loaded."""
    args = ["--packages", "email", "tkinter", "asyncio", "--width", 64, "--layers", 1, "--vocabulary", 1024]
    args += ["--length", 32, "--epochs", 2, "--batch", 8, "--rate", 3e-3]
    pattern = r"accuracy (\S+) of (\d+) texts"
    alone, texts = numbers(scripts.run("classify.py", *args, "--out", scripts.folder / "c0"), pattern)
    config = ["--deepspeed", EXAMPLES / "ds_config_zero2_cpu.json", "--out", scripts.folder / "c1"]
    found, _ = numbers(scripts.run("classify.py", *args, *config), pattern)
    assert found == alone
    assert found > 1 / 3 + 5 * math.sqrt(2 / texts) / 3


def test_summaries(scripts):
    """What it has been shown it says nearly word by word, and not what is said of another function. Catches:
    generation with weights of the beginning."""
    args = ["--packages", "email", "--functions", 64, "--held-out", 16, "--width", 64, "--layers", 1]
    args += ["--vocabulary", 512, "--length", 48, "--sentence", 16, "--epochs", 30, "--rate", 5e-3]
    config = ["--deepspeed", EXAMPLES / "ds_config_zero2_cpu.json", "--out", scripts.folder / "s"]
    shown = scripts.run("summarise.py", *args, *config)
    found, chance = numbers(shown, r"seen: .*ROUGE-L (\S+), against other functions' (\S+)")
    assert chance + 0.4 < found <= 1
    assert "held out: loss" in shown


def test_translations(scripts):
    """What it has been shown it translates nearly word by word. Catches what the one above does, with weights on
    disk."""
    args = ["--languages", "de", "--width", 64, "--layers", 1, "--vocabulary", 512, "--length", 24]
    args += ["--epochs", 40, "--rate", 5e-3]
    config = ["--deepspeed", EXAMPLES / "ds_config_zero3_nvme.json", "--out", scripts.folder / "t"]
    shown = scripts.run("translate.py", *args, *config)
    found, chance = numbers(shown, r"seen: .*BLEU (\S+), against other sentences' (\S+)")
    assert chance + 0.5 < found <= 1
    assert "held out: loss" in shown


def test_questions(scripts):
    """Of texts that it has not seen. Whole texts have all the words of the answers, and more. Seven of eight are exact,
    which has a deviation of sqrt(7 / n) / 8 for n questions: the texts of another Python are allowed four of them.
    Catches: places of another window or text."""
    args = ["--packages", "email", "asyncio", "concurrent", "tkinter", "--width", 32, "--layers", 1]
    args += ["--vocabulary", 512, "--length", 96, "--epochs", 8, "--rate", 5e-3]
    config = ["--deepspeed", EXAMPLES / "ds_config_zero2_cpu.json", "--out", scripts.folder / "q"]
    pattern = r"exact (\S+), F1 (\S+) of (\d+) questions in (\d+) windows; F1 of whole texts (\S+)"
    exact, f1, questions, windows, whole = numbers(scripts.run("question_answering.py", *args, *config), pattern)
    assert windows > questions
    assert exact > 7 / 8 - 4 * math.sqrt(7 / questions) / 8
    assert f1 > whole + 0.2


def test_adapter_and_generation(scripts, pretrained):
    """Catches: whole weights saved for an adapter, an adapter that is left out, weights from the disk that differ."""
    config = ["--deepspeed", EXAMPLES / "ds_config_zero3_cpu.json", "--out", scripts.folder / "l"]
    args = ["--model", scripts.folder / "p/model", "--packages", "email", "--length", 48, "--steps", 30]
    before, after = numbers(scripts.run("lora_sft.py", *args, *config, "--rate", 1e-2), HELD_OUT)
    assert after < before - 0.1
    adapter = scripts.folder / "l/adapter"
    assert not (adapter / "model.safetensors").exists()
    texts = []
    for folder, offload in (
        (adapter, "none"),
        (adapter, f"nvme:{scripts.folder}"),
        (scripts.folder / "p/model", "none"),
    ):
        asked = ["--prompt", "def close(self):", "--tokens", 24, "--temperature", 0, "--dtype", "fp32"]
        out = scripts.folder / "texts.json"
        scripts.run("generate.py", "--model", folder, *asked, "--offload", offload, "--out", out)
        texts.append(json.loads(out.read_text()))
    assert texts[0] == texts[1] != texts[2]


def ask(url: str, body: bytes | None = None) -> tuple[int, dict]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else {"detail": text}


def test_service(scripts, pretrained):
    """Catches: a limit that is not kept, a request that ends the service, a health that waits for an answer."""
    limits = ["--max-seconds", 3, "--max-tokens", 100_000, "--max-requests", 1, "--max-prompt", 20, "--max-bytes", 500]
    asked = ["--model", scripts.folder / "p/model", "--port", 0, "--offload", "cpu", *limits]
    process, _, err = scripts.start("serve.py", *asked)
    try:
        while not (found := re.search(r"running on (http://[0-9.:]+)", err.read_text())):
            assert process.poll() is None, err.read_text()[-6000:]
        url = found[1]
        check_answers(url)
        process.send_signal(15)
        process.wait(20)
    finally:
        process.kill()
    assert "Traceback" not in err.read_text()


def check_answers(url: str) -> None:
    status, told = ask(f"{url}/health")
    assert (status, told["requests"]) == (200, 0)
    body = json.dumps({"prompt": "def ", "tokens": 8, "temperature": 1.0, "seed": 3}).encode()
    assert ask(f"{url}/generate", body) == ask(f"{url}/generate", body)
    long: list = []
    # An answer that only its seconds end.
    endless = json.dumps({"prompt": "def ", "tokens": 100_000, "temperature": 2.0}).encode()
    waiting = threading.Thread(target=lambda: long.append(ask(f"{url}/generate", endless)))
    waiting.start()
    while ask(f"{url}/health")[1]["requests"] == 0:
        assert waiting.is_alive(), long
    assert ask(f"{url}/generate", body) == (503, {"detail": "too many requests at a time"})
    waiting.join(60)
    assert long[0][0] == 200
    for wrong, status, words in (
        ({"prompt": ""}, 422, "at least 1 character"),
        ({"prompt": "a", "tokens": 100_001}, 422, "at most 100000 are made"),
        ({"prompt": "a", "tokens": 0}, 422, "greater than or equal to 1"),
        ({"prompt": "zq " * 30}, 422, "at most 20 are taken"),
        ({"prompt": "a", "temperature": math.nan}, 422, "finite"),
        ({"prompt": "\ud800"}, 422, "unicode"),
        ({"prompt": "a", "top_k": 3}, 422, "not permitted"),
        ({"prompt": "a" * 500}, 413, "at most 500 are taken"),
    ):
        code, told = ask(f"{url}/generate", json.dumps(wrong).encode())
        assert code == status, (wrong, told)
        assert words in json.dumps(told)
    assert ask(f"{url}/generate", body)[0] == 200


def test_deepspeed_there_and_back(scripts):
    """What is not DeepSpeed's writes zeroxide's checkpoints; the way over a universal one leaves every bit. Catches:
    moments, counts of updates or a schedule that do not come along."""
    script, folder = "deepspeed_there_and_back.py", scripts.folder / "there"

    def train(steps: int, out: str, *more: object) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return scripts.run(script, "--width", 32, "--steps", steps, "--out", folder / out, *more, MASTER_PORT=port)

    straight = train(6, "straight")
    train(3, "first")
    from zeroxide.checkpoint.convert.convert import convert

    convert(folder / "first", folder / "universal", "universal", None, include_frozen=True)
    convert(folder / "universal", folder / "back", None, None, include_frozen=True)
    then = train(6, "end", "--load", folder / "back")
    pattern = r"\+zeroxide step (\d) loss (\S+)"
    assert re.findall(pattern, then) == re.findall(pattern, straight)[3:]
    assert len(re.findall(pattern, then)) == 3


def test_scores(monkeypatch):
    """By hand. Catches: a precision that is a recall, a subsequence that must be in one piece."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import scores

    assert scores.rouge_l("the old cat sat", "the cat") == pytest.approx(2 * 2 / 6)
    assert scores.word_f1("cat the", "The cat sat") == pytest.approx(2 * 2 / 5)
    # Of 6, 5, 4 and 3 pieces all but one are right, and the text is one word of seven short.
    said, expected = ["it is a cat on mats"], ["see it is a cat on mat"]
    assert scores.bleu(said, expected) == pytest.approx(math.exp(1 - 7 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
