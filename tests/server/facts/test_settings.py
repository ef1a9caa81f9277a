"""Flags, variables and defaults; one clear line for every bad value."""

import os
from pathlib import Path

import pytest

from moestro.engine import EngineConfig
from moestro.server.facts.refusal import Refused
from moestro.server.facts.settings import (
    Settings,
    load_places,
    load_settings,
    misspelt_variables,
    parse_size,
    prepare_allocator,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1024", 1024),
        ("16MiB", 16 << 20),
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 kib", 1536),
        ("7B", 7),
        ("1TB", 10**12),
        (" 3gb ", 3 * 10**9),
    ],
)
def test_sizes(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GiB", "9000000000TiB"])
def test_sizes_beyond_any_machine(text):
    with pytest.raises(ValueError, match="is more than any machine has") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["", "2G", "MiB", "-1MiB", "1e9", "1 2MiB", "nan", "0x10", "²"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_defaults():
    settings = load_settings({"model": "demo"})
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "cpu")
    assert settings.cache_dir == Path.home() / ".cache" / "moestro"
    assert not settings.keys and not settings.allow_origin
    assert settings.prefetch


def test_flags_win_over_variables(monkeypatch):
    monkeypatch.setenv("MOESTRO_PORT", "9000")
    monkeypatch.setenv("MOESTRO_HOST_MEMORY", "1GiB")
    monkeypatch.setenv("MOESTRO_KV_MEMORY", "")
    settings = load_settings({"model": "demo", "port": "9001"})
    assert (settings.port, settings.host_memory, settings.kv_memory) == (9001, 1 << 30, None)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("port", "abc", "--port: 'abc' is not a port number from 0 to 65535"),
        ("port", "70000", "--port: '70000' is not a port number from 0 to 65535"),
        ("host_memory", "16 apples", "--host-memory: '16 apples' is not a size above 0 such as"),
        ("host_memory", "0", "--host-memory: '0' is not a size above 0 such as"),
        ("kv_memory", "2G", "--kv-memory: '2G' is not a size"),
        ("threads", "0", "--threads: '0' is not a whole number above 0"),
        ("experts_per_token", "x", "--experts-per-token: 'x' is not a whole number above 0"),
        ("experts_tau", "1.1", "--experts-tau: '1.1' is not a number from 0 to 1"),
        ("experts_tau", "nan", "--experts-tau: 'nan' is not a number from 0 to 1"),
        ("max_model_len", "-1", "--max-model-len: '-1' is not a whole number above 0"),
        ("max_step_tokens", "15", "--max-step-tokens: '15' is not a whole number from 16 on"),
        ("max_step_tokens", "1e3", "--max-step-tokens: '1e3' is not a whole number from 16 on"),
        (
            "expert_format",
            "int3",
            "--expert-format: 'int3' is not an expert format "
            "(native, int8, int4, mxfp4, fp8, nf4, auto, mixed:FILE)",
        ),
        ("device", "cuda:x", "--device: 'cuda:x' is not served; what exists: auto, cpu, cuda"),
        ("device_memory", "1GiB", "--device-memory: device cpu has no memory of its own"),
        ("model", "/no/where", "MODEL: there is no folder '/no/where'"),
        (
            "model",
            "~nosuchuser/x",
            "MODEL: '~nosuchuser/x': no user here has that home folder",
        ),
        ("model", "x" * 5000, "MODEL: cannot read '/"),
        ("model", "", "MODEL: '' is neither 'demo' nor a checkpoint's folder"),
        ("cache_dir", "", "--cache-dir: '' is not a folder"),
        ("cache_dir", " ", "--cache-dir: ' ' is not a folder"),
        ("cache_dir", "~nosuchuser/x", "--cache-dir: '~nosuchuser/x': no user here"),
        ("cache_dir", "x" * 5000, "--cache-dir: cannot read '/"),
        ("cache_dir", __file__, f"--cache-dir: '{__file__}' is not a folder"),
        ("cache_dir", f"{__file__}/below", f"--cache-dir: '{__file__}' is not a folder"),
        ("host_memory", "9" * 400, "--host-memory: '999"),
        ("threads", "99999999999", "--threads: 99999999999 threads are too many for "),
        ("max_model_len", "9" * 9000, "--max-model-len: '999"),
        ("stuck_after", "0", "--stuck-after: '0' is not seconds above 0"),
        ("served_model_name", "", "--served-model-name: '' is not a name of 1 to 256 characters"),
    ],
)
def test_bad_flags(field, value, line):
    with pytest.raises(Refused) as caught:
        load_settings({"model": "demo", field: value})
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_bad_variables_are_named_as_such(monkeypatch):
    monkeypatch.setenv("MOESTRO_HOST_MEMORY", "much")
    with pytest.raises(Refused, match="^MOESTRO_HOST_MEMORY: 'much' is not a size"):
        load_settings({"model": "demo"})


@pytest.mark.parametrize("key", ["", "two words", "ключ"])
def test_bad_keys_are_not_shown(key):
    with pytest.raises(Refused) as caught:
        load_settings({"model": "demo", "api_key": key})
    assert "--api-key" in str(caught.value)
    assert not key or key not in str(caught.value)


def test_keys_are_masked(monkeypatch):
    monkeypatch.setenv("MOESTRO_API_KEY", "hidden")
    settings = load_settings({"model": "demo"})
    assert settings.keys == {"hidden"}
    assert "hidden" not in repr(settings)


def test_names(tmp_path):
    assert Settings(model="demo").served_name == "demo"
    assert Settings(model=str(tmp_path)).served_name == tmp_path.name
    assert Settings(model="demo", served_model_name="a/b").served_name == "a/b"


def test_engine_config(tmp_path):
    settings = load_settings(
        {
            "model": str(tmp_path),
            "device": "auto",
            "host_memory": "16MiB",
            "kv_memory": "1MiB",
            "experts_per_token": "3",
            "experts_mode": "sequence",
            "experts_density": "0.25",
            "prefetch": False,
            "prefetch_experts": "2",
            "threads": "1",
            "max_model_len": "100",
            "max_step_tokens": "16",
            "cache_dir": str(tmp_path),
        }
    )
    assert settings.to_engine_config() == EngineConfig(
        model_path=tmp_path,
        cache_dir=tmp_path,
        device="auto",
        host_memory_bytes=16 << 20,
        kv_memory_bytes=1 << 20,
        experts_per_token=3,
        sequence_density=0.25,
        prefetch=False,
        prefetch_experts=2,
        threads=1,
        max_model_len_tokens=100,
        max_step_tokens=16,
    )


def test_the_least_step_has_a_token_for_each_who_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("MOESTRO_MAX_STEP_TOKENS", "16")
    config = load_settings({"model": str(tmp_path)}).to_engine_config()
    assert config.max_step_tokens == 16 == config.max_running
    monkeypatch.setenv("MOESTRO_MAX_STEP_TOKENS", "0")
    with pytest.raises(Refused, match="^MOESTRO_MAX_STEP_TOKENS: '0' is not a whole number"):
        load_settings({"model": "demo"})


def test_places(monkeypatch, tmp_path):
    monkeypatch.setenv("MOESTRO_CACHE_DIR", str(tmp_path))
    assert load_places(None).cache_dir == tmp_path
    assert load_places("~/x").cache_dir == Path.home() / "x"
    with pytest.raises(Refused, match="^--cache-dir: '~nosuchuser'"):
        load_places("~nosuchuser")
    monkeypatch.setenv("MOESTRO_CACHE_DIR", "~nosuchuser")
    with pytest.raises(Refused, match="^MOESTRO_CACHE_DIR: '~nosuchuser'"):
        load_places(None)


def test_as_many_threads_as_make_sense():
    most = os.cpu_count() or 1
    assert load_settings({"model": "demo", "threads": str(most)}).threads == most
    with pytest.raises(Refused, match=f"the most is {most}$"):
        load_settings({"model": "demo", "threads": str(most + 1)})


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("12GB/s", (12_000_000_000, 0.0)),
        ("25GB/s,20us", (25_000_000_000, 2e-5)),
        ("1.5GiB/s, 0.5ms", (3 << 29, 5e-4)),
    ],
)
def test_an_emulated_link_has_a_speed_and_a_latency(text, link):
    given = {"model": "demo", "emulate_link": text, "device_memory": "1GiB"}
    config = load_settings(given).to_engine_config()
    assert config.link is not None
    assert (config.link.bandwidth_bytes_per_s, config.link.latency_s) == pytest.approx(link)
    assert config.device_memory_bytes == 1 << 30


@pytest.mark.parametrize(
    "text", ["12GB", "fast", "12GB/s,", "12GB/s,20", "0GB/s", "-1GB/s", "9" * 400]
)
def test_what_is_no_link_is_refused(text):
    with pytest.raises(Refused, match="^--emulate-link: .* is not a speed above 0"):
        load_settings({"model": "demo", "emulate_link": text, "device_memory": "1GiB"})


def test_an_emulated_link_leads_to_some_memory():
    with pytest.raises(Refused, match="^--emulate-link: .* --device-memory"):
        load_settings({"model": "demo", "emulate_link": "12GB/s"})


def test_a_variable_that_is_no_setting_is_said_with_the_nearest_name() -> None:
    environment = {
        "MOESTRO_HOST_MEMROY": "16MiB",
        "MOESTRO_HOST_MEMORY": "16MiB",
        "moestro_port": "1",
        "MOESTRO_TORCH": "",
        "HOME": "/",
    }
    assert misspelt_variables(environment) == [
        "MOESTRO_HOST_MEMROY is no setting and changes nothing; did you mean MOESTRO_HOST_MEMORY?"
    ]


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_gpu_s_allocator_is_set_where_the_user_has_not(device):
    environment: dict[str, str] = {}
    prepare_allocator(device, environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        own = {name: "max_split_size_mb:64"}
        prepare_allocator(device, own)
        assert own == {name: "max_split_size_mb:64"}


def test_a_cpu_needs_no_allocator_of_a_gpu():
    environment: dict[str, str] = {}
    prepare_allocator("cpu", environment)
    assert environment == {}
