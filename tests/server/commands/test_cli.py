"""The command as a user meets it: help, refusals, exit codes. Needs no model."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moestro.server.facts.settings import Settings


def moestro(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "moestro.server", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | variables,
        check=False,
    )


def assert_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"moestro: [^\n]+\n", done.stderr)
    for word in words:
        assert word in done.stderr


def test_help_is_quick_and_brings_no_torch():
    began_s = time.monotonic()
    done = moestro("serve", "--help")
    assert time.monotonic() - began_s < 2  # 0.25 s on an idle machine
    assert done.returncode == 0
    assert "moestro serve demo" in done.stdout
    probe = "import sys, moestro.server.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", probe], check=False).returncode == 0


def test_help_tells_the_true_defaults():
    text = moestro("serve", "--help").stdout
    settings = Settings(model="demo")
    for flag, default in (
        ("--host", settings.host),
        ("--port", settings.port),
        ("--device", settings.device),
        ("--expert-format", settings.expert_format),
        ("--prefetch-experts", settings.prefetch_experts),
        ("--experts-mode", "token; sequence for a model without a router"),
        ("--experts-density", "0.5; a model without a router has its own"),
    ):
        block = re.search(rf"  {flag} .*?(?=\n  --|\Z)", text, re.DOTALL)
        assert block is not None
        assert f"[default: {default}]" in " ".join(block[0].split())


def test_flags_are_those_that_were_promised():
    promised = (
        "--host --port --device --device-memory --emulate-link --host-memory --kv-memory "
        "--expert-format --dense-format --experts-per-token --experts-tau "
        "--experts-mode --experts-density --no-prefetch --no-host-compute "
        "--prefetch-experts --threads "
        "--max-model-len --max-step-tokens --served-model-name --cache-dir "
        "--api-key --api-key-file --allow-origin --help"
    )
    text = moestro("serve", "--help").stdout
    assert set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE)) == set(promised.split())


def test_version():
    done = moestro("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"moestro \d+\.\d+\.\d+\n", done.stdout)


def test_no_arguments_teach():
    done = moestro()
    assert done.returncode == 0
    assert "moestro serve demo" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "demo", "--prot", "1"), ("--prot", "--port")),
        (("serv", "demo"), ("serv", "serve")),
        (("serve",), ("MODEL",)),
        (("serve", "demo", "--port", "abc"), ("--port", "'abc'", "port number")),
        (("serve", "demo", "--host-memory", "lots"), ("--host-memory", "'lots'", "16MiB")),
        (("serve", "demo", "--prefetch-experts", "0"), ("--prefetch-experts", "--no-prefetch")),
        (("serve", "demo", "--device", "tpu"), ("--device", "auto, cpu, cuda")),
        (("serve", "demo", "--device-memory", "1GiB"), ("--device-memory", "--host-memory")),
        (("serve", "demo", "--emulate-link", "fast"), ("--emulate-link", "12GB/s")),
        (("serve", "demo", "--emulate-link", "12GB/s"), ("--emulate-link", "--device-memory")),
        (("serve", "/no/where"), ("MODEL", "/no/where")),
        (("serve", "demo", "--host", "no such host"), ("--host",)),
        (("serve", "~nosuchuser/x"), ("MODEL", "~nosuchuser/x")),
        (("serve", "x" * 5000), ("MODEL", "too long")),
        (("serve", "demo", "--host-memory", "9" * 400), ("--host-memory", "more than any")),
        (("serve", "demo", "--threads", "99999999999"), ("--threads", "the most is")),
        (("serve", "demo", "--cache-dir", "~nosuchuser/x"), ("--cache-dir",)),
        (("serve", "demo", "--cache-dir", __file__), ("--cache-dir", "is not a folder")),
    ],
)
def test_refusals_are_one_line(arguments, words):
    assert_refused(moestro(*arguments), *words)


def test_port_in_use_is_refused_before_loading():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(moestro("serve", "demo", "--port", port), port, "in use", "--port")


def test_bad_variable_is_named():
    assert_refused(moestro("serve", "demo", MOESTRO_THREADS="many"), "MOESTRO_THREADS", "'many'")


@pytest.mark.slow  # brings torch
def test_factorize_of_a_missing_folder(tmp_path: Path):
    done = moestro("factorize", "/no/where", str(tmp_path / "out"))
    assert_refused(done)


@pytest.mark.slow  # brings torch
def test_export_of_what_was_not_factorized(tmp_path: Path):
    done = moestro("export", str(tmp_path), str(tmp_path / "out"))
    assert_refused(done, "was not made by `moestro factorize`", "moestro.json")
    assert not (tmp_path / "out").exists()


def test_the_names_that_factorize_offers_are_those_it_knows(tmp_path: Path):
    from typing import get_args

    from moestro.factorize.facts import ROUTERS, SCALES, SPLITS
    from moestro.factorize.families import carried_words
    from moestro.server.commands import factorize_flags as flags

    for offered, known in ((flags.Split, SPLITS), (flags.Router, ROUTERS), (flags.Scale, SCALES)):
        assert get_args(get_args(offered)[0]) == known
    assert flags.CARRIED.startswith(f"{carried_words()}:")
    done = moestro("factorize", "x", str(tmp_path / "out"), "--split", "best")
    assert_refused(done, "--split", "coactivation")


@pytest.mark.slow  # brings torch
def test_a_plan_is_shown_without_a_source(tmp_path: Path):
    from moestro.factorize import demo_plan

    shipped = tmp_path / "plan.safetensors"
    demo_plan().write(shipped)
    done = moestro("factorize", "--show-plan", str(shipped))
    assert (done.returncode, done.stderr) == (0, "")
    assert "24 experts of 32; 8 to 24 (12 on average) experts per token" in done.stdout
    assert_refused(moestro("factorize", "--show-plan", __file__), "is not a plan of moestro")


@pytest.mark.slow  # brings torch
def test_the_chain_from_the_command_line(tmp_path: Path):
    from tiny_llama import write_tiny_llama

    dense = write_tiny_llama(tmp_path / "dense", max_position_embeddings=512)
    out, work = tmp_path / "out", tmp_path / "work"
    words = ["factorize", str(dense), str(out), "--experts", "6", "--shared", "0", "--top-k", "2"]
    words += ["--split", "kmeans", "--router", "norm", "--router-steps", "5", "--work", str(work)]
    words += ["--calibration-tokens", "512", "--scale", "calibrated"]
    words += ["--router-hidden", "4", "--router-bias"]
    dry = moestro(*words, "--dry-run")
    assert (dry.returncode, out.exists(), work.exists()) == (0, False, False)
    assert "a dry run, nothing is written" in dry.stdout
    done = moestro(*words)
    assert done.returncode == 0, done.stderr
    assert "the dense model writes 512 tokens itself, with the seed 0" in done.stderr
    assert "6 experts of 8, 2 per token (33.3% of the FFN)" in done.stdout
    assert sorted(path.name.partition("-")[0] for path in work.iterdir()) == [
        *("collect", "route", "sampled", "split")
    ]
    assert "a first layer of 4 neurons, a bias: with a file of routers" in done.stdout
    assert (out / "moestro_routers.safetensors").is_file()
    assert_refused(moestro(*words), "exists already")
    words[2] = str(tmp_path / "other")
    assert_refused(moestro(*words, "--tau", "0.5"), "tau compares foretold norms")
