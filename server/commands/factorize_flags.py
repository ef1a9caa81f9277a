"""The flags of `factorize`, `export` and `evaluate` in words."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Exit, Option

from .flags import named, named_path

# said here, and held against the families themselves by a test: help must not wait for torch
CARRIED = (
    "Llama, Mistral, Ministral, Qwen2, Seed-OSS, SmolLM3, Granite, Gemma, Phi-3 and OLMo: the first"
    " Gemma and OLMo, Phi-3 without longrope"
)
Source = Annotated[
    str,
    Argument(
        metavar="SOURCE",
        parser=named,
        show_default=False,
        help=f"The folder of a dense checkpoint ({CARRIED}), or `demo-dense` (or `demo`): the dense"
        " model that the demo is made of.",
    ),
]
Out = Annotated[
    Path,
    Argument(
        parser=named_path, metavar="OUT", show_default=False, help="The new folder for the result."
    ),
]
Calibration = Annotated[
    list[Path] | None,
    Option(
        "--calibration",
        metavar="FILE",
        show_default=False,
        help="Plain text to observe the model on: like what it will be used for; repeat for more"
        " files. Without any, the model writes a text itself, by --seed.",
    ),
]
PlanFile = Annotated[
    Path | None,
    Option(
        "--plan",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="Apply this plan as it is; nothing is observed, and the other choices do not count.",
    ),
]
WritePlan = Annotated[
    Path | None,
    Option(
        "--write-plan",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="Keep the plan: which neurons form an expert, routers, scales, how they came about.",
    ),
]
Experts = Annotated[
    int,
    Option(
        "--experts",
        metavar="N",
        min=1,
        help="Routed experts per layer. A layer's neurons less --shared must be a multiple of it.",
    ),
]
Shared = Annotated[
    int,
    Option(
        "--shared",
        metavar="N",
        min=0,
        help="Neurons of each layer that are always on: those whose output is largest. More of them"
        " keep more of the quality; 0 makes every neuron an expert's.",
    ),
]
TopK = Annotated[int, Option("--top-k", metavar="K", min=1, help="Experts that each token uses.")]
LayerTopK = Annotated[
    str,
    Option(
        "--layer-top-k",
        metavar="same|measured|K,K,…",
        help="Experts that each token uses in each layer. same: --top-k in all of them; measured:"
        " each layer is tried with fewer and with all on the --calibration text, and takes what"
        " loses least at the same work, also in a plan that --plan names, and with --recover-mode"
        " sequence as a prompt chooses; or a number for each layer, whose mean is --top-k. Unequal"
        " layers keep more of the quality, and are served by moestro alone.",
    ),
]
CalibrationTokens = Annotated[
    int,
    Option(
        "--calibration-tokens",
        metavar="N",
        min=1,
        help="How much of the text to observe. Memory and time grow with it: see --dry-run.",
    ),
]
Seed = Annotated[
    int,
    Option("--seed", metavar="N", help="For all that is drawn: clusters, steps, the model's text."),
]
Split = Annotated[
    Literal["coactivation", "kmeans", "importance", "contiguous", "random"],
    Option(
        "--split",
        help="Which neurons form an expert together. coactivation: those that a router foresees"
        " together (how the demo was made; the slowest); kmeans: those with alike gate weights;"
        " importance: each takes what matters most to one kind of text; contiguous: slices as they"
        " lie; random. With all experts on, every split is the dense model.",
    ),
]
Router = Annotated[
    Literal["ridge", "prior", "norm", "moefication", "none"],
    Option(
        "--router",
        help="What a token's experts are chosen by. ridge: foretells the size of each expert's"
        " output, solved at once; norm: the same by training; moefication: its share of the"
        " activation; prior: the experts nearest to the dense output (FactorLLM); none: a prompt"
        " runs all experts, and --top-k of them, by their share of the activation there, serve its"
        " answer (GRIFFIN).",
    ),
]
RouterSteps = Annotated[
    int,
    Option(
        "--router-steps",
        metavar="N",
        min=1,
        help="Training steps of the routers prior, norm and moefication.",
    ),
]
RouterHidden = Annotated[
    int,
    Option(
        "--router-hidden",
        metavar="N",
        min=0,
        help="Neurons of a first layer in the routers (D2DMoE has 128), which finds more of the"
        " experts that matter; only for those three. Above 0 the result has a file of routers"
        " beside the weights: moestro serves it, and transformers refuses it. 0: linear routers.",
    ),
]
RouterBias = Annotated[
    bool,
    Option(
        "--router-bias",
        help="Give the routers a bias, as FactorLLM has it; not with ridge. Needs the file of"
        " routers, too.",
    ),
]
Tau = Annotated[
    float,
    Option(
        "--tau",
        metavar="T",
        min=0.0,
        max=1.0,
        help="With --router norm, run only those of a token's --top-k experts whose foretold"
        " output is at least 1 - T times the largest one: easy tokens then take fewer experts and"
        " misses, at some cost in quality. 1 runs all, 0 the largest alone. Below 1 it needs the"
        " file of routers; `moestro serve --experts-tau` takes another T.",
    ),
]
Scale = Annotated[
    Literal["one", "calibrated", "inverse-k"],
    Option(
        "--scale",
        help="What the sum of a token's experts is multiplied with. one: nothing, so that all"
        " experts together are the dense model; calibrated: each layer's best number on the text;"
        " inverse-k: experts / top-k (FactorLLM).",
    ),
]
Recover = Annotated[
    str | None,
    Option(
        "--recover",
        metavar="STAGES",
        show_default=False,
        help="Bring back what is lost by leaving experts out: repair (each layer's down projection,"
        " solved in one go), lora (the whole model learns to predict what the dense one does, into"
        " small deltas and the routers), or both: repair,lora. Minutes to hours on the CPU.",
    ),
]
RecoverMinutes = Annotated[
    float,
    Option("--recover-minutes", metavar="M", min=0, help="At the most, for the stage lora."),
]
RecoverSteps = Annotated[
    int | None,
    Option(
        "--recover-steps",
        metavar="N",
        min=1,
        show_default=False,
        help="So many steps of lora instead, one window of text each: a result that can be had"
        " again, however fast the machine.",
    ),
]
RecoverTokens = Annotated[
    int,
    Option(
        "--recover-tokens",
        metavar="N",
        min=1,
        help="How much of --calibration recovery reads; the more, the better other texts fare.",
    ),
]
RecoverRank = Annotated[
    int | None,
    Option(
        "--recover-rank",
        metavar="R",
        min=1,
        help="Of the deltas that lora keeps: their file grows with it. Those of --deltas are cut to"
        " their largest directions where it is smaller. [default: that of --deltas, or 5]",
    ),
]
RecoverBits = Annotated[
    int,
    Option(
        "--recover-bits",
        metavar="B",
        min=4,
        max=8,
        help="Of a number of those deltas, 8 or 4: with 4, twice the rank takes the same bytes.",
    ),
]
RecoverMode = Annotated[
    str,
    Option(
        "--recover-mode",
        metavar="MODES",
        help="What lora practises: token (each token's router chooses), sequence (the prompt"
        " chooses for all that follows, as --experts-mode sequence serves), or both in turns:"
        " token,sequence.",
    ),
]
DeltasFile = Annotated[
    Path | None,
    Option(
        "--deltas",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="Apply the deltas of a recovery, together with the --plan that it wrote; with"
        " --recover, go on from them.",
    ),
]
WriteDeltas = Annotated[
    Path | None,
    Option(
        "--write-deltas",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="Keep what recovery has added to the weights; --write-plan keeps the plan that goes"
        " with it.",
    ),
]
Work = Annotated[
    Path | None,
    Option(
        "--work",
        parser=named_path,
        metavar="DIR",
        show_default=False,
        help="Keep here what the model did on the text: a stopped run goes on where it stopped, and"
        " another --split or --router of the same text starts at once. Remove it when done."
        " [default: memory, a layer at a time]",
    ),
]
DryRun = Annotated[
    bool,
    Option(
        "--dry-run",
        help="Only show what each stage would read, write, compute and hold; nothing is written.",
    ),
]


def _show_plan(path: Path | None) -> None:
    if path is None:
        return
    from .making import print_plan

    print_plan(path)
    raise Exit


ShowPlan = Annotated[
    Path | None,
    Option(
        "--show-plan",
        parser=named_path,
        metavar="FILE",
        is_eager=True,
        callback=_show_plan,
        show_default=False,
        help="Only show what this plan says: its choices, its text, how well it routes.",
    ),
]
Checkpoint = Annotated[
    Path,
    Argument(
        parser=named_path, metavar="FOLDER", show_default=False, help="The checkpoint's folder."
    ),
]
Texts = Annotated[
    list[Path],
    Option(
        "--text",
        metavar="FILE",
        show_default=False,
        help="Plain text to predict; repeat for more files.",
    ),
]
Factorized = Annotated[
    Path,
    Argument(
        parser=named_path,
        metavar="FOLDER",
        show_default=False,
        help="What `moestro factorize` made.",
    ),
]
ExportPlan = Annotated[
    Path | None,
    Option(
        "--plan",
        parser=named_path,
        metavar="FILE",
        show_default=False,
        help="The plan that made FOLDER (see --write-plan of factorize): each neuron gets its place"
        " back, so that the weights are the dense model's, bit by bit (of a float32 model with a"
        " --top-k that is no power of two, but for the last bit). Without it the neurons stay"
        " grouped as the experts were, which computes the same.",
    ),
]
EXPORT_HELP = """Turn a factorized model back into its dense one, for other tools.

    \b
    Examples:
      moestro export ./my-moe ./my-llama
      moestro export ./my-moe ./my-llama --plan plan.safetensors
    \b
    Splitting changes no weight, so nothing is lost: all experts together are the dense model. It is
    written in the smallest type that holds its weights exactly. What has no way back is refused: a
    --scale other than one, weights trained after the split, a model that factorize did not make.
    \b
    The result has the family of the source; a Mistral without a window becomes a Llama, which has
    the same tensors. An OLMo keeps its weights centred, which computes the same.
    """
EvaluationTokens = Annotated[
    int, Option("--tokens", metavar="N", min=2, help="How much of the text.")
]
EvaluationMode = Annotated[
    Literal["token", "sequence"],
    Option(
        "--experts-mode",
        help="sequence: the first half of each window of 512 tokens chooses the experts of its"
        " second half, which alone is scored (of a dense model, to compare with, too).",
    ),
]
EvaluationExperts = Annotated[
    int | None,
    Option(
        "--experts-per-token",
        metavar="K",
        min=1,
        show_default=False,
        help="Experts that each token uses. [default: the model's own]",
    ),
]
