"""The `moestro` command. Imports the heavy parts inside the commands, so that --help is instant."""

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from moestro.server.facts import Refused, prepare_allocator, refusal_line

from . import factorize_flags as making
from . import flags
from .models import models_app
from .parameters import places_of, said, settings_of

if TYPE_CHECKING:
    import socket

    from moestro.server.facts import Settings

INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 128 + signal.SIGPIPE

app = typer.Typer(
    rich_markup_mode=None,  # plain help: quick, and no boxes around errors
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Exit codes: 0 done, 2 refused (one line says why), 130 interrupted, 143 terminated.

    141 where nobody reads what was printed any more, as a shell's tools do.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = app(prog_name="moestro", standalone_mode=False)
        sys.stdout.flush()
    except TyperException as error:
        code = _refuse(f"{error.format_message()} (see moestro --help)")
    except Refused as refusal:
        code = _refuse(str(refusal))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = READER_GONE  # the interpreter's last flush shall not fail for the same reason again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code or 0)


def _refuse(message: str) -> int:
    typer.echo(refusal_line(message), err=True)
    return 2


@contextmanager
def _big_imports() -> Iterator[None]:
    """While big libraries are imported: some of them swallow a KeyboardInterrupt.

    What they make is kept for good. Looking there for garbage takes a tenth of the time that they
    need, and as long again at each full collection later.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        signal.signal(signal.SIGINT, before)


@contextmanager
def _command_imports() -> Iterator[None]:
    """The same for a command that does its work in this thread, which signals then unwind."""
    with _big_imports():
        yield
    _unwind_when_terminated()


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"moestro {version('moestro')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Serves Mixture-of-Experts language models whose experts do not fit into fast memory.

    \b
    Start here:
      moestro serve demo                          a small real model on 127.0.0.1:8000
      moestro serve ./my-moe --host-memory 8GiB   your own checkpoint, experts in 8 GiB
      moestro plan ./my-moe                       what that takes and gives, without loading it
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def serve(
    model: flags.Model,
    host: flags.Host = None,
    port: flags.Port = None,
    device: flags.Device = None,
    device_memory: flags.DeviceMemory = None,
    emulate_link: flags.EmulateLink = None,
    host_memory: flags.HostMemory = None,
    kv_memory: flags.KvMemory = None,
    expert_format: flags.ExpertFormat = None,
    dense_format: flags.DenseFormat = None,
    experts_per_token: flags.ExpertsPerToken = None,
    experts_tau: flags.ExpertsTau = None,
    experts_mode: flags.ExpertsMode = None,
    experts_density: flags.ExpertsDensity = None,
    no_prefetch: flags.NoPrefetch = False,
    no_host_compute: flags.NoHostCompute = False,
    prefetch_experts: flags.PrefetchExperts = None,
    threads: flags.Threads = None,
    max_model_len: flags.MaxModelLen = None,
    max_step_tokens: flags.MaxStepTokens = None,
    served_model_name: flags.ServedModelName = None,
    cache_dir: flags.CacheDir = None,
    api_key: flags.ApiKey = None,
    api_key_file: flags.ApiKeyFile = None,
    allow_origin: flags.AllowOrigin = None,
) -> None:
    """Serve a model over HTTP, in the manner of OpenAI's API.

    \b
    Examples:
      moestro serve demo
      moestro serve demo --host-memory 16MiB --experts-per-token 6
      moestro serve ./my-moe --host 0.0.0.0 --api-key "$KEY"
      moestro serve org/name@v1.0       (from a hub: HF_TOKEN, HF_HOME and HF_ENDPOINT are its own)
    \b
    Sizes are like 16MiB, 2GiB, 500MB or plain bytes. Each flag is also a variable:
    MOESTRO_HOST_MEMORY=2GiB is --host-memory 2GiB, MOESTRO_PREFETCH=false is --no-prefetch;
    a flag wins. Ctrl-C lets running requests finish, a second one does not.
    """
    given = said(locals(), "no_prefetch", "no_host_compute")
    if no_prefetch:
        given["prefetch"] = False
    if no_host_compute:
        given["host_compute"] = False
    settings = settings_of(given)
    from .listen import listening_socket

    raise typer.Exit(_serve(settings, listening_socket(settings.host, settings.port)))


def _unwind_when_terminated() -> None:
    """From here on SIGTERM and SIGHUP end a command through its `finally`s: nothing half-made."""

    def unwind(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, unwind)


def _serve(settings: "Settings", listener: "socket.socket") -> int:
    began_s = time.monotonic()
    prepare_allocator(settings.device)
    with _big_imports():
        from .start import run_server

    return run_server(settings, listener, began_s)


@app.command()
def plan(
    model: flags.Model,
    device: flags.Device = None,
    device_memory: flags.CardMemory = None,
    link: flags.Link = None,
    host_memory: flags.HostMemory = None,
    kv_memory: flags.KvMemory = None,
    expert_format: flags.ExpertFormat = None,
    dense_format: flags.DenseFormat = None,
    experts_per_token: flags.ExpertsPerToken = None,
    experts_tau: flags.ExpertsTau = None,
    threads: flags.Threads = None,
    max_model_len: flags.MaxModelLen = None,
    max_step_tokens: flags.MaxStepTokens = None,
    cache_dir: flags.CacheDir = None,
    disk_speed: flags.DiskSpeed = None,
    trace: flags.Trace = None,
    as_json: flags.AsJson = False,
) -> None:
    """Show what serving a model would take and give, without loading it.

    \b
    Examples:
      moestro plan ./my-moe --host-memory 8GiB
      moestro plan ./only-config-json --json --disk-speed 3GB
      moestro plan org/name             (fetches config and index, no weights)
      moestro plan org/name --device cuda --device-memory 12GiB   (no GPU needed)
    \b
    A folder with config.json is enough; the weight index and the headers of weight files are used
    where they are. Memory is what `moestro serve` prints with the same flags. Speeds are bounds
    from a second of measuring, not promises. Budgets that contradict are refused with the nearest
    plan that fits.
    \b
    --json prints one object of model, memory, experts, link, compute, decode, prefill, changes:
    sizes in bytes (…_bytes), times in seconds (…_s), speeds per second (tokens_per_s).
    """
    given = said(locals(), "disk_speed", "link", "trace", "as_json")
    settings = settings_of(given)
    with _command_imports():
        from .plan import run_plan

    run_plan(settings, disk_speed, link, trace, as_json)


@app.command("gpu-check", help=flags.GPU_CHECK_HELP)
def gpu_check(
    device: flags.CheckedDevice = "cuda",
    quick: flags.Quick = False,
    out: flags.ReportOut = None,
    cache_dir: flags.CacheDir = None,
) -> None:
    places = places_of(cache_dir)
    with _command_imports():
        from moestro.server.gpu_check import run_gpu_check

    raise typer.Exit(run_gpu_check(device, quick, out, places.cache_dir))


app.add_typer(models_app, name="models")
trace_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Record which experts a model asks for."
)
app.add_typer(trace_app, name="trace")


@trace_app.command()
def record(
    model: flags.Model,
    out: flags.TraceOut,
    prompts: flags.Prompts,
    tokens: flags.TraceTokens = 64,
    host_memory: flags.HostMemory = None,
    expert_format: flags.ExpertFormat = None,
    experts_per_token: flags.ExpertsPerToken = None,
    experts_tau: flags.ExpertsTau = None,
    threads: flags.Threads = None,
    cache_dir: flags.CacheDir = None,
) -> None:
    """Run prompts, one after another, and write down which experts they asked for.

    \b
    Example:
      moestro trace record demo demo.trace --prompts prompts.txt
      moestro trace replay demo.trace
      moestro plan demo --trace demo.trace
    """
    given = said(locals(), "out", "prompts", "tokens")
    settings = settings_of(given)
    with _command_imports():
        from .tracing import run_record

    run_record(settings, out, prompts, tokens)


@trace_app.command()
def replay(trace: flags.TraceFile, as_json: flags.AsJson = False, plot: flags.Plot = None) -> None:
    """Hit rates that a trace would have had: by budget and policy, with Belady's as the ceiling.

    \b
    Example:
      moestro trace replay demo.trace --plot demo.svg
    """
    with _command_imports():
        from .tracing import run_replay

    run_replay(trace, as_json, plot)


@trace_app.command()
def mix(
    trace: flags.TraceFile,
    out: flags.Mixture,
    fine: flags.Fine,
    coarse: flags.Coarse,
    share: flags.Share = 0.25,
) -> None:
    """Write down which experts to keep in a finer format: those that a trace asked for most.

    \b
    Example:
      moestro trace mix demo.trace mix.json --fine int8 --coarse int4 --share 0.25
      moestro serve demo --expert-format mixed:mix.json
    """
    with _command_imports():
        from .tracing import run_mix

    run_mix(trace, out, fine, coarse, share)


@app.command()
def factorize(
    source: making.Source,
    out: making.Out,
    calibration: making.Calibration = None,
    experts: making.Experts = 24,
    shared: making.Shared = 768,
    top_k: making.TopK = 12,
    layer_top_k: making.LayerTopK = "same",
    split: making.Split = "coactivation",
    router: making.Router = "ridge",
    router_steps: making.RouterSteps = 300,
    router_hidden: making.RouterHidden = 0,
    router_bias: making.RouterBias = False,
    tau: making.Tau = 1.0,
    scale: making.Scale = "one",
    calibration_tokens: making.CalibrationTokens = 32768,
    seed: making.Seed = 0,
    plan: making.PlanFile = None,
    write_plan: making.WritePlan = None,
    recover: making.Recover = None,
    recover_minutes: making.RecoverMinutes = 60.0,
    recover_steps: making.RecoverSteps = None,
    recover_tokens: making.RecoverTokens = 65536,
    recover_rank: making.RecoverRank = None,
    recover_bits: making.RecoverBits = 8,
    recover_mode: making.RecoverMode = "token",
    deltas: making.DeltasFile = None,
    write_deltas: making.WriteDeltas = None,
    show_plan: making.ShowPlan = None,
    work: making.Work = None,
    dry_run: making.DryRun = False,
    cache_dir: flags.CacheDir = None,
) -> None:
    """Split the feed-forward layers of a dense model into experts.

    \b
    Examples:
      moestro factorize demo-dense ./demo-moe --calibration text.txt --write-plan plan.safetensors
      moestro factorize ./my-llama ./my-moe --experts 8 --shared 0 --top-k 6 --work ./work
      moestro factorize ./my-llama ./my-moe --router norm --tau 0.8
      moestro factorize ./my-llama ./my-moe --calibration text.txt --recover repair,lora
      moestro factorize ./my-llama ./my-moe --dry-run
      moestro factorize --show-plan plan.safetensors
    \b
    A chain: collect (what each layer sees on the text) -> split (neurons into experts) -> route
    (which experts a token takes) -> recover (if asked for: what is lost, learnt back) -> apply
    (the checkpoint, for `moestro serve` and transformers).
    """
    given = said(locals(), "show_plan") | {"cache_dir": places_of(cache_dir).cache_dir}
    with _command_imports():
        from .making import factorize as make

    make(**given)


@app.command(help=making.EXPORT_HELP)
def export(folder: making.Factorized, out: making.Out, plan: making.ExportPlan = None) -> None:
    with _command_imports():
        from .making import export as turn_back

    turn_back(folder, out, plan)


@app.command()
def evaluate(
    folder: making.Checkpoint,
    text: making.Texts,
    tokens: making.EvaluationTokens = 8192,
    experts_per_token: making.EvaluationExperts = None,
    experts_mode: making.EvaluationMode = "token",
) -> None:
    """Measure how well a checkpoint predicts a text (perplexity).

    Example: moestro evaluate ./demo-moe --text book.txt --experts-per-token 6
    """
    with _command_imports():
        from .making import evaluate as measure

    measure(folder, text, tokens, experts_per_token, experts_mode)
