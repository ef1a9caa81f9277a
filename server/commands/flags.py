"""The flags of the command line in words. Values are strings: `settings` reads and checks them."""

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option


def named(value: str) -> str:
    """Any name but an empty one."""
    if not value.strip():
        raise BadParameter(f"{value!r} is no name")
    return value


def named_path(value: str) -> Path:
    """A path as typed. An empty one would be the current folder, which nobody asked for."""
    if not value.strip():
        raise BadParameter(f"{value!r} is no file or folder")
    return Path(value)


Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        show_default=False,
        help="`demo` (a small real model, fetched at the first start), a checkpoint's folder, a"
        " GGUF file, or org/name[@revision] on a hub.",
    ),
]
Host = Annotated[
    str | None,
    Option("--host", metavar="HOST", help="Address to listen on. [default: 127.0.0.1]"),
]
Port = Annotated[
    str | None, Option("--port", metavar="PORT", help="Port; 0 takes a free one. [default: 8000]")
]
Device = Annotated[
    str | None,
    Option(
        "--device",
        metavar="DEVICE",
        help="Where to compute: cpu, cuda, cuda:N, or auto (cuda where there is one)."
        " [default: cpu]",
    ),
]
DeviceMemory = Annotated[
    str | None,
    Option(
        "--device-memory",
        metavar="SIZE",
        help="Room for experts on a device with its own memory; on cpu only with --emulate-link."
        " [default: what is free there]",
    ),
]
CardMemory = Annotated[
    str | None,
    Option(
        "--device-memory",
        metavar="SIZE",
        help="With --device cuda: of the card to plan for, which need not be here, such as 12GiB."
        " [default: what is free on the one that is]",
    ),
]
Link = Annotated[
    str | None,
    Option(
        "--link",
        metavar="SIZE",
        help="With --device cuda: bytes per second into the card. [default: 25GB/s, PCIe 4 x16]",
    ),
]
EmulateLink = Annotated[
    str | None,
    Option(
        "--emulate-link",
        metavar="SPEED[,LATENCY]",
        help="For measuring: as if --device-memory were behind a link of this speed, such as"
        " 12GB/s,20us; all its figures say `emulated`. [default: none]",
    ),
]
HostMemory = Annotated[
    str | None,
    Option(
        "--host-memory",
        metavar="SIZE",
        help="Room for experts in host memory, such as 16MiB or 8GiB. [default: what fits]",
    ),
]
KvMemory = Annotated[
    str | None,
    Option(
        "--kv-memory",
        metavar="SIZE",
        help="Room for the attention cache of running requests. [default: what fits]",
    ),
]
ExpertFormat = Annotated[
    str | None,
    Option(
        "--expert-format",
        metavar="FORMAT",
        help="How experts are kept: native (bytes as in the checkpoint), int8 (one byte a weight,"
        " W8A8), int4 (half a byte, in groups of 64; CPU only), mxfp4 (half a byte, in groups of"
        " 32, which takes over gpt-oss's files exactly; CPU only), fp8 (one byte, e4m3 in groups of"
        " 128; CPU only), nf4 (half a byte, for CUDA: slow on a CPU; needs moestro[nf4]; int4 and"
        " fp8 keep what a checkpoint has in them as it is), mixed:FILE (each as FILE says; see"
        " `moestro trace mix`) or auto (with a GPU the finest of native and int8 whose experts all"
        " fit its memory, else nf4, or int8 without moestro[nf4]; native on a CPU; the start says"
        " which and why). [default: native]",
    ),
]
DenseFormat = Annotated[
    str | None,
    Option(
        "--dense-format",
        metavar="FORMAT",
        help="How the other linear layers are kept: native (the checkpoint's dtype, computed with"
        " as fp32) or int8 (one byte per weight). [default: native]",
    ),
]
ExpertsPerToken = Annotated[
    str | None,
    Option(
        "--experts-per-token",
        metavar="K",
        help="Experts that each token uses. [default: the model's own]",
    ),
]
ExpertsTau = Annotated[
    str | None,
    Option(
        "--experts-tau",
        metavar="T",
        help="Of a token's experts run those whose foretold output is at least 1 - T times the"
        " largest one: 1 is all, 0 the largest alone. For models of `moestro factorize --router"
        " norm --tau`. [default: the model's own]",
    ),
]
ExpertsMode = Annotated[
    str | None,
    Option(
        "--experts-mode",
        metavar="MODE",
        help="Who chooses the experts of an answer, where its request does not say: token (the"
        " model's router, token by token) or sequence (the prompt, once for all of it: other"
        " answers, and no misses once they are here). [default: token; sequence for a model without"
        " a router]",
    ),
]
ExpertsDensity = Annotated[
    str | None,
    Option(
        "--experts-density",
        metavar="D",
        help="Share of each layer's experts, and of the neurons that all tokens run, that a prompt"
        " keeps in mode sequence, where its request does not say. [default: 0.5; a model without"
        " a router has its own]",
    ),
]
NoPrefetch = Annotated[
    bool,
    Option("--no-prefetch", help="Load experts only when asked for. [default: guess ahead]"),
]
NoHostCompute = Annotated[
    bool,
    Option(
        "--no-host-compute",
        help="Copy every expert that a device misses, however slow its link. [default: split]",
    ),
]
PrefetchExperts = Annotated[
    str | None,
    Option(
        "--prefetch-experts",
        metavar="N",
        help="Experts of the next layer that one guess may load. [default: 1]",
    ),
]
Threads = Annotated[
    str | None,
    Option(
        "--threads",
        metavar="N",
        help="Threads that compute, at most the CPUs that affinity mask, cpu quota and cpuset"
        " allow. [default: as many, at most one per physical core, less one where that leaves more"
        " than two]",
    ),
]
MaxModelLen = Annotated[
    str | None,
    Option(
        "--max-model-len",
        metavar="TOKENS",
        help="Longest prompt plus answer. [default: the model's own]",
    ),
]
MaxStepTokens = Annotated[
    str | None,
    Option(
        "--max-step-tokens",
        metavar="N",
        help="Tokens that one step computes at most. Each step of a prompt loads the missing"
        " experts once: larger ones load fewer bytes, take memory and make running answers wait."
        " [default: 512 to 2048, as memory allows]",
    ),
]
ServedModelName = Annotated[
    str | None,
    Option(
        "--served-model-name",
        metavar="NAME",
        help="What clients call the model. [default: demo, org/name, or the folder's name]",
    ),
]
CacheDir = Annotated[
    str | None,
    Option(
        "--cache-dir",
        metavar="FOLDER",
        help="Where downloads and packs are kept. [default: ~/.cache/moestro]",
    ),
]
ApiKey = Annotated[
    list[str] | None,
    Option(
        "--api-key",
        metavar="KEY",
        show_default=False,
        help="Clients must send it; repeat for more, any of which opens. MOESTRO_API_KEY, for one,"
        " hides it from `ps`. [default: none]",
    ),
]
ApiKeyFile = Annotated[
    str | None,
    Option(
        "--api-key-file",
        metavar="FILE",
        help="More keys: one a line; lines with # are comments. [default: none]",
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    Option(
        "--allow-origin",
        metavar="ORIGIN",
        show_default=False,
        help="Web pages of this origin, such as http://localhost:3000, may call the server from"
        " a browser; repeat for more, * for all. [default: none]",
    ),
]

# Of `plan`.
DiskSpeed = Annotated[
    str | None,
    Option(
        "--disk-speed",
        metavar="SIZE",
        help="Bytes per second that the disk reads, such as 500MB. [default: measured]",
    ),
]
Trace = Annotated[
    Path | None,
    Option(
        "--trace",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="Predict hits from this recorded trace. [default: every expert equally likely]",
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object instead of text.")]

# Of `gpu-check`.
GPU_CHECK_HELP = """Check and measure an NVIDIA GPU, into a report that can be sent to us.

\b
Examples:
  moestro gpu-check --quick
  docker run --rm --gpus all -v moestro-data:/data moestro gpu-check
\b
Correctness on small random models, how fast host memory is pinned and the link copies, and tokens a
second on layers of real widths. The report is kept after each check, also when one fails or Ctrl-C
ends it; it names no host, user or folder. Exit code 1 where a check failed, 2 without a GPU.
"""
CheckedDevice = Annotated[
    str,
    Option(
        "--device",
        metavar="DEVICE",
        help="cuda, cuda:N, or cpu: one is imagined there, to see what a report looks like.",
    ),
]
Quick = Annotated[bool, Option("--quick", help="Two minutes instead of ten.")]
ReportOut = Annotated[
    Path | None,
    Option(
        "--out",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="The report; beside it, the same as text in FILE's name with .txt."
        " [default: gpu-check.json here, or in the cache folder]",
    ),
]

# Of `trace`.
TraceOut = Annotated[
    Path, Argument(parser=named_path, metavar="OUT", help="The new trace file.", show_default=False)
]
TraceFile = Annotated[
    Path, Argument(parser=named_path, metavar="TRACE", help="A recorded trace.", show_default=False)
]
Prompts = Annotated[
    Path,
    Option("--prompts", parser=named_path, metavar="FILE", help="Plain text, one prompt a line."),
]
TraceTokens = Annotated[
    int, Option("--tokens", metavar="N", min=1, help="New tokens for each prompt.")
]
Mixture = Annotated[
    Path,
    Argument(parser=named_path, metavar="OUT", help="The new map of formats.", show_default=False),
]
Fine = Annotated[str, Option("--fine", metavar="FORMAT", help="For those asked for most often.")]
Coarse = Annotated[str, Option("--coarse", metavar="FORMAT", help="For all others.")]
Share = Annotated[
    float,
    Option("--share", metavar="S", min=0.0, max=1.0, help="Share of all experts kept fine."),
]
Plot = Annotated[
    Path | None,
    Option(
        "--plot",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="Draw hit rate against bytes into this .svg or .png (needs moestro[plot]).",
    ),
]
