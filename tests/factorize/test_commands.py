import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moestro.engine import Manifest, Progress
from moestro.factorize import (
    Deltas,
    FactorizeError,
    Inputs,
    Outputs,
    Plan,
    RecoverOptions,
    SplitOptions,
    perplexity,
    run_dry,
    run_evaluate,
    run_factorize,
    show_plan,
)
from moestro.factorize.recovery import layer_losses
from tiny_llama import write_text

SPLIT = SplitOptions(experts=4, shared_neurons=16, top_k=3, calibration_tokens=1024)


def quiet(_: Progress) -> None:
    pass


def test_make_write_and_apply(long_dense: Path, texts: list[Path], tmp_path: Path) -> None:
    said = run_factorize(
        str(long_dense),
        tmp_path / "out",
        replace(SPLIT, seed=3),
        Inputs(calibration=tuple(texts)),
        Outputs(plan=tmp_path / "plan.safetensors"),
        quiet,
    )
    assert "3 layers, each 16 neurons always on and 4 experts of 8, 3 per token (83.3%" in said
    plan = Plan.read(tmp_path / "plan.safetensors")
    assert re.fullmatch(
        rf"OMP_NUM_THREADS=1 moestro factorize {long_dense} OUT --calibration \S+0.txt "
        r"--calibration \S+1.txt --experts 4 --shared 16 --top-k 3 --seed 3 "
        r"--calibration-tokens 1024 --split coactivation --router ridge --scale one "
        r"--write-plan \S+plan.safetensors",
        plan.facts.command,
    )
    given = Inputs(plan=tmp_path / "plan.safetensors")
    run_factorize(str(long_dense), tmp_path / "again", SPLIT, given, Outputs(), quiet)
    first, again = (Manifest.read(tmp_path / name) for name in ("out", "again"))
    assert first == again is not None
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_existing_folder_is_left_alone(long_dense: Path, tmp_path: Path) -> None:
    with pytest.raises(FactorizeError, match="exists already"):
        run_factorize(str(long_dense), tmp_path, SPLIT, Inputs(), Outputs(), quiet)
    with pytest.raises(FactorizeError, match="exists already"):
        run_dry(str(long_dense), tmp_path, SPLIT, Inputs())


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """By file: its bytes and when it was written last."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_dry_run_writes_nothing_and_says_what_would_be(
    long_dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    out, before = tmp_path / "out", tree(tmp_path)
    given = Inputs(calibration=tuple(texts), work=tmp_path / "work", cache_dir=tmp_path / "cache")
    said = run_dry(str(long_dense), out, SPLIT, given)
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [
        *("stage", "collect", "split", "route", "apply")
    ]
    assert tree(tmp_path) == before
    alone = run_dry(str(long_dense), out, SPLIT, Inputs(cache_dir=tmp_path / "cache"))
    assert "sample " in alone
    with pytest.raises(FactorizeError, match="not enough for 33 experts"):
        run_dry(str(long_dense), out, replace(SPLIT, experts=33), given)
    with pytest.raises(FactorizeError, match="cannot read the text"):
        run_dry(str(long_dense), out, SPLIT, Inputs(calibration=(tmp_path / "none",)))
    with pytest.raises(FactorizeError, match="a dry run fetches nothing"):
        run_dry("demo-dense", out, SPLIT, given)


def test_what_is_written_is_what_was_foretold(
    long_dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    given = Inputs(calibration=tuple(texts), work=tmp_path / "work")
    said = run_dry(str(long_dense), tmp_path / "out", SPLIT, given)
    foretold = {line.split()[0]: float(line.split()[3]) for line in said.splitlines()[2:6]}  # in MB
    written: dict[Path, int] = {}

    def watch(notice: Progress) -> None:
        for path in (tmp_path / "work").rglob("*.safetensors"):
            written[path] = path.stat().st_size
            if path.name == "hidden.safetensors":  # anew behind each layer
                written[path] *= notice.done

    run_factorize(str(long_dense), tmp_path / "out", SPLIT, given, Outputs(), watch)
    for stage in ("collect", "split", "route"):
        sizes = [n for path, n in written.items() if path.parent.name.startswith(stage)]
        # a header of some 200 bytes for each of up to four files
        assert sum(sizes) / 1e6 == pytest.approx(foretold[stage], rel=0.05, abs=0.06), stage
    size_bytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size_bytes / 1e6 == pytest.approx(foretold["apply"], rel=0.05, abs=0.1)


def test_without_a_text_the_model_writes_one(long_dense: Path, tmp_path: Path) -> None:
    options = replace(SPLIT, calibration_tokens=128, window_tokens=64)
    plans = []
    for name, seed, work in (("a", 0, None), ("b", 0, "work"), ("c", 0, "work"), ("d", 1, None)):
        given = Inputs(work=tmp_path / work if work else None)
        chosen = replace(options, seed=seed)
        path = tmp_path / f"{name}.plan"
        run_factorize(str(long_dense), tmp_path / name, chosen, given, Outputs(plan=path), quiet)
        plans.append(Plan.read(path))
    texts = [plan.facts.texts_sha256 for plan in plans]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert "--calibration " not in plans[0].facts.command
    assert list((tmp_path / "work").glob("sampled-*.safetensors"))


def test_a_plan_on_one_screen(long_dense: Path, texts: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    given = Inputs(calibration=tuple(texts))
    options = replace(SPLIT, scale="calibrated", router="norm", router_steps=5, split="kmeans")
    said = run_factorize(
        str(long_dense), tmp_path / "out", options, given, Outputs(plan=path), quiet
    )
    assert "not the dense model any more" in said
    screen = show_plan(path)
    assert len(screen.splitlines()) <= 24
    for words in (
        f"format 2, sha256 {Plan.read(path).sha256}",
        "3 layers, each 16 of 48 neurons always on and 4 experts of 8; 3 experts per token",
        "kmeans, seed 0",
        "norm (5 steps of Adam); matrices (4, 32), as stock checkpoints have",
        "calibrated: the sum of a token's experts is multiplied with ",
        "--split kmeans --router norm --scale calibrated --router-steps 5",
    ):
        assert words in screen
    with pytest.raises(FactorizeError, match="is not a plan"):
        show_plan(texts[0])


def test_routers_with_more_are_told_of_everywhere(
    long_dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    options = replace(
        SPLIT,
        router="norm",
        router_steps=5,
        router_hidden=8,
        router_bias=1,
        tau=0.75,
        split="random",
    )
    given, path = Inputs(calibration=tuple(texts)), tmp_path / "plan.safetensors"
    words = "are foretold at least 0.25 of the largest (tau 0.75)"
    for said in (
        run_dry(str(long_dense), tmp_path / "out", options, given),
        run_factorize(str(long_dense), tmp_path / "out", options, given, Outputs(path), quiet),
    ):
        assert f"a first layer of 8 neurons, a bias, experts that {words}: with a file" in said
    screen = show_plan(path)
    assert f"3 experts per token, of which those run that {words}" in screen
    assert "weights and a file of routers, for moestro alone" in screen
    assert "--router-steps 5 --router-hidden 8 --router-bias --tau 0.75" in screen
    text = write_text(tmp_path / "held-out.txt", seed=9)
    found = [
        perplexity(tmp_path / "out", text, 512, quiet, experts_per_token=k).value for k in (None, 1)
    ]
    assert found[0] != found[1]
    with pytest.raises(FactorizeError, match="recovery practises what linear routers choose"):
        run_dry(str(long_dense), tmp_path / "again", options, given, RecoverOptions())
    dry = run_dry(str(long_dense), tmp_path / "again", SPLIT, Inputs(plan=path))
    assert "with a file of routers" in dry


def test_a_dry_run_tells_of_recovery(long_dense: Path, texts: list[Path], tmp_path: Path) -> None:
    given = Inputs(calibration=tuple(texts))
    said = run_dry(
        str(long_dense), tmp_path / "out", SPLIT, given, RecoverOptions(steps=7, tokens=1024)
    )
    stages = [line.split()[0] for line in said.splitlines()[2:8]]
    assert stages == ["collect", "split", "route", "repair", "distill", "apply"]
    bound = run_dry(
        str(long_dense), tmp_path / "out", SPLIT, given, RecoverOptions(("lora",), minutes=9)
    )
    assert "distillation ends after 9 minutes" in bound
    assert "distillation ends" not in said and "repair" not in bound


def test_recovery_writes_a_plan_and_deltas_that_make_the_same_model(
    long_dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    given = Inputs(calibration=tuple(texts), work=tmp_path / "work")
    kept = Outputs(tmp_path / "plan", tmp_path / "deltas")
    recovery = RecoverOptions(steps=3, tokens=1024, bits=4)
    said = run_factorize(
        str(long_dense), tmp_path / "out", SPLIT, given, kept, quiet, recovery=recovery
    )
    assert "3 steps of distillation" in said and "not the dense model any more" in said
    again = Inputs(plan=kept.plan, deltas=kept.deltas)
    run_factorize(str(long_dense), tmp_path / "again", SPLIT, again, Outputs(), quiet)
    first, second = (Manifest.read(tmp_path / name) for name in ("out", "again"))
    assert first == second and first is not None and first.deltas_sha256
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    command = Plan.read(tmp_path / "plan").facts.command
    flags = "--recover-rank 5 --recover-bits 4 --recover-tokens 1024 --recover-steps 3"
    assert f"--recover repair,lora {flags}" in command
    assert command.endswith(f"--write-plan {kept.plan} --write-deltas {kept.deltas}")
    with pytest.raises(FactorizeError, match="for another plan"):
        run_factorize(
            str(long_dense),
            tmp_path / "other",
            SPLIT,
            replace(given, work=None),
            Outputs(plan=tmp_path / "other.plan"),
            quiet,
        )
        foreign = Inputs(plan=tmp_path / "other.plan", deltas=kept.deltas)
        run_factorize(str(long_dense), tmp_path / "third", SPLIT, foreign, Outputs(), quiet)


def test_a_plan_without_routers_is_told_of_and_not_recovered(
    long_dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    options, kept = replace(SPLIT, router="none"), Outputs(plan=tmp_path / "plan")
    given = Inputs(calibration=tuple(texts))
    said = run_factorize(str(long_dense), tmp_path / "out", options, given, kept, quiet)
    assert "per answer, chosen by its prompt" in said and "no router: a prompt runs all" in said
    assert f"{options.top_k} experts per answer" in show_plan(tmp_path / "plan")
    with pytest.raises(FactorizeError, match="no router: its tokens take all experts"):
        run_evaluate(tmp_path / "out", list(texts), 64, 2, quiet)
    again = replace(given, plan=tmp_path / "plan")
    for inputs, words in ((again, "--recover-mode sequence"), (given, "leave one out")):
        with pytest.raises(FactorizeError, match=words):
            run_factorize(
                str(long_dense),
                tmp_path / "other",
                options,
                inputs,
                Outputs(),
                quiet,
                recovery=RecoverOptions(tokens=1024),
            )


@pytest.mark.parametrize(
    ("given", "recovery", "words"),
    [
        (Inputs(), RecoverOptions(), "give --calibration"),
        (Inputs(deltas=Path("deltas")), None, "go with the --plan"),
        (Inputs((Path("text"),), deltas=Path("deltas")), RecoverOptions(), "go with the --plan"),
        (Inputs((Path("text"),)), RecoverOptions(("prune",)), "not prune"),
        (Inputs((Path("text"),)), RecoverOptions(("lora",), modes=("layer",)), "not layer"),
    ],
)
def test_recoveries_that_cannot_be_are_refused_before_any_work(
    given: Inputs, recovery: RecoverOptions | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(FactorizeError, match=words):
        run_factorize("/none", tmp_path / "out", SPLIT, given, Outputs(), quiet, recovery=recovery)


def test_texts_too_short_to_learn_from_are_refused_before_any_work(
    long_dense: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.factorize.commands.make_plan", None)
    given, recovery = Inputs(calibration=tuple(texts)), RecoverOptions(("lora",), tokens=10**7)
    with pytest.raises(FactorizeError, match="use a longer one or ask for fewer tokens"):
        run_factorize(
            str(long_dense), tmp_path / "out", SPLIT, given, Outputs(), quiet, recovery=recovery
        )


def test_layers_take_what_was_measured(
    long_dense: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a new plan, and of one that is there; what was measured can be given by hand."""
    monkeypatch.setattr(layer_losses, "SURE", 0.0)  # of random weights nothing is
    outputs, given = Outputs(plan=tmp_path / "plan.safetensors"), Inputs(calibration=tuple(texts))
    run_factorize(str(long_dense), tmp_path / "same", SPLIT, given, outputs, quiet)
    same = Plan.read(tmp_path / "plan.safetensors")
    measuring = replace(given, measures_layers=True)
    said = run_dry(str(long_dense), tmp_path / "out", SPLIT, measuring)
    assert re.search(r"^layers +0", said, re.MULTILINE)
    said = run_factorize(str(long_dense), tmp_path / "out", SPLIT, measuring, outputs, quiet)
    found = Plan.read(tmp_path / "plan.safetensors")
    assert "--layer-top-k measured" in found.facts.command
    counts = found.layer_counts
    assert max(counts) > min(counts) and sum(counts) <= 3 * 3
    assert f"{min(counts)} to {max(counts)} ({sum(counts) / 3:.4g} on average) per token" in said
    assert f"experts per token: {' '.join(map(str, counts))}" in show_plan(
        tmp_path / "plan.safetensors"
    )
    same.write(tmp_path / "same.safetensors")
    of_plan = replace(measuring, plan=tmp_path / "same.safetensors")
    run_factorize(str(long_dense), tmp_path / "of-plan", SPLIT, of_plan, Outputs(), quiet)
    by_hand = replace(SPLIT, layer_top_k=" ".join(map(str, counts)))
    run_factorize(str(long_dense), tmp_path / "by-hand", by_hand, given, Outputs(), quiet)
    there = Inputs(plan=tmp_path / "same.safetensors")
    run_factorize(str(long_dense), tmp_path / "by-hand-of-plan", by_hand, there, Outputs(), quiet)
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("out", "of-plan", "by-hand", "by-hand-of-plan", "same")
    ]
    assert weights[0] == weights[1] == weights[2] == weights[3] != weights[4]
    few = replace(SPLIT, layer_top_k="3 3")
    with pytest.raises(FactorizeError, match="2 layers' experts per token are given, and the mod"):
        run_factorize(str(long_dense), tmp_path / "few", few, there, Outputs(), quiet)


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({}, {"calibration": ()}, "looks at text that people wrote; give --calibration"),
        ({"router": "none"}, {}, "needs linear routers"),
        ({"router": "norm", "router_bias": 1}, {}, "needs linear routers"),
    ],
)
def test_layers_that_cannot_be_measured(
    options: dict[str, Any],
    inputs: dict[str, Any],
    words: str,
    long_dense: Path,
    texts: list[Path],
    tmp_path: Path,
) -> None:
    given = replace(Inputs(calibration=tuple(texts), measures_layers=True), **inputs)
    with pytest.raises(FactorizeError, match=words):
        run_factorize(
            str(long_dense), tmp_path / "out", replace(SPLIT, **options), given, Outputs(), quiet
        )


@pytest.mark.parametrize("measured", [True, False])
def test_layers_are_chosen_after_a_recovery_too(
    measured: bool,
    long_dense: Path,
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The deltas then go with the new plan, and a recovery goes on from there."""
    monkeypatch.setattr(layer_losses, "SURE", 0.0)
    given = Inputs(calibration=tuple(texts))
    kept = Outputs(tmp_path / "plan", tmp_path / "deltas")
    recovery = RecoverOptions(("lora",), steps=3, tokens=1024)
    source = str(long_dense)
    run_factorize(source, tmp_path / "out", SPLIT, given, kept, quiet, recovery=recovery)
    learnt = Deltas.read(tmp_path / "deltas")
    after = replace(given, plan=kept.plan, deltas=kept.deltas, measures_layers=measured)
    options = SPLIT if measured else replace(SPLIT, layer_top_k="4 2 3")
    run_factorize(source, tmp_path / "uneven", options, after, kept, quiet)
    plan, deltas = Plan.read(tmp_path / "plan"), Deltas.read(tmp_path / "deltas")
    assert len(set(plan.layer_counts)) > 1 and deltas.facts.plan_sha256 == plan.sha256
    assert all(deltas.tensors[name].equal(part) for name, part in learnt.tensors.items())
    on = replace(after, measures_layers=False)
    run_factorize(source, tmp_path / "on", SPLIT, on, kept, quiet, recovery=recovery)
    assert Plan.read(tmp_path / "plan").layer_counts == plan.layer_counts
    assert Deltas.read(tmp_path / "deltas").facts.steps == 6
