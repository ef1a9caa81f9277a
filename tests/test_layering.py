"""Who may import whom, held over the source text. CONTRIBUTING.md says why.

Each rule is a function from a folder of sources to what is wrong in it, so that the same rule is
shown to see what was planted.
"""

import ast
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from source_tree import REPO, ROOMS, Sources, imports, imports_for_types, lazy_imports, tree

# Which doors a room may knock at.
DOORS = {
    "cache": set[str](),
    "engine": {"cache"},
    "factorize": {"engine", "cache"},
    "server": {"engine"},
}
# The command line reaches one room more, and only inside the sub-command that needs it.
LAZY_DOORS = {"server": {"factorize"}}

THIRD_PARTIES = {
    "cache": {"torch", "safetensors", "numpy"},
    "engine": {
        "bitsandbytes",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "llguidance",
        "numpy",
        "psutil",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    },
    "factorize": {"torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf"},
    "server": {
        "fastapi",
        "h11",
        "httpx2",  # the client of huggingface_hub, whose errors it lets through
        "huggingface_hub",  # asks for and fetches models by their hub name: server/hub alone
        "starlette",
        "pydantic",
        "pydantic_core",
        "pydantic_settings",
        "uvicorn",
        "prometheus_client",
        "typer",
        "rich",
        "anyio",
        "matplotlib",
    },
}
# Optional extras: importable only inside the function that needs them.
LAZY_LIBRARIES = {"bitsandbytes", "matplotlib"}

# The order of the wings, room by room: which of them a wing may import, through their doors. The
# files at the top of a room ("") join its wings. ARCHITECTURE.md draws the same.
WINGS: dict[str, dict[str, set[str]]] = {
    "cache": {
        "facts": set(),
        "pack": {"facts"},
        "policy": {"facts"},
        "tiers": {"facts", "pack", "policy"},
        "traces": {"facts", "policy"},
        "": {"facts", "pack", "policy", "tiers", "traces"},
    },
    "engine": {
        "facts": set(),
        "kernels": {"facts"},
        "formats": {"facts", "kernels"},
        "quantized": {"facts"},
        "gguf_files": {"facts", "quantized"},
        "weights": {"facts", "kernels", "formats", "quantized", "gguf_files"},
        "selection": {"facts"},
        "routers": {"facts", "kernels", "formats", "weights"},
        "model": {"facts", "kernels", "formats", "weights", "selection", "routers"},
        "neurons": {"facts", "kernels", "weights", "selection", "model"},
        "lanes": {"facts", "formats", "model"},
        "planning": {"facts", "kernels", "formats", "weights", "model", "lanes"},
        "forecasts": {"facts", "kernels", "formats", "weights", "planning", "lanes"},
        "text": {"facts", "weights", "gguf_files"},
        "step": {"facts", "selection", "model", "lanes", "text"},
        "gpu_check": {"facts", "planning", "step"},
        "": {
            *("facts", "kernels", "formats", "weights", "selection", "model", "lanes"),
            *("routers", "neurons", "planning", "forecasts", "text", "step", "gpu_check"),
        },
    },
    "factorize": {
        "facts": set(),
        "families": {"facts"},
        "sources": {"facts", "families"},
        "methods": {"facts", "sources"},
        "recovery": {"facts"},
        "": {"facts", "families", "sources", "methods", "recovery"},
    },
    "server": {
        "facts": set(),
        "contract": {"facts"},
        "metrics": {"facts", "contract"},
        "parsing": {"facts"},
        "api": {"facts", "contract", "metrics", "parsing"},
        "api.dialects": {"facts", "contract", "metrics", "parsing", "api"},
        "serving": {"facts", "contract", "metrics", "api", "api.dialects"},
        "hub": {"facts"},
        "gpu_check": {"facts"},
        "plans": {"facts"},
        "commands": {"facts", "serving", "hub", "plans", "gpu_check"},
        "": {"commands"},
    },
}

# Files that decide. They hold integers and keys, never tensors: neither they nor what they import
# of their own room may import a tensor library.
TORCH_FREE = {
    "cache": {
        *("facts/errors", "facts/keys", "facts/layout", "facts/plan", "facts/stats", "facts/units"),
        *("policy/counters", "policy/frequency", "policy/guesses", "policy/host_residency"),
        *("policy/lru", "policy/residency", "policy/table"),
        *("tiers/link", "traces/replayer", "traces/tracefile"),
    },
    "engine": {
        *("facts/cgroups", "facts/config", "facts/errors", "facts/grammar", "facts/stats"),
        *("facts/threads", "facts/units", "model/regret", "weights/manifest"),
        *("forecasts/advice", "forecasts/card", "forecasts/forecast", "forecasts/gains"),
        *("planning/device_memory", "planning/step_size"),
        "selection/keep",
        *("step/params", "step/scheduler", "step/sequence"),
    },
    "factorize": {"facts/errors"},
    "server": {"facts/refusal", "facts/settings", "parsing/parser"},
}
TENSOR_LIBRARIES = {"torch", "transformers", "safetensors", "numpy", "tokenizers", "gguf"}

MAX_FILES_OF_A_FOLDER = 14

Rule = Callable[[Sources], list[str]]


def past_a_door(sources: Sources) -> list[str]:
    """From room to room, and from wing to wing inside one: downwards, and only through doors."""
    wrong = []
    for path in sources.of_rooms():
        room, wing = sources.wing_of(path)
        lazy = lazy_imports(tree(path))
        own = {f"moestro.{room}.{name}" for name in WINGS[room][wing]}
        for name, line in imports(tree(path)):
            if name != "moestro" and not name.startswith("moestro."):
                continue
            doors = DOORS[room] | (LAZY_DOORS.get(room, set()) if (name, line) in lazy else set())
            if name not in {f"moestro.{door}" for door in doors} | own:
                wrong.append(f"{sources.where(path, line)} imports {name}")
    return wrong


def around_a_door(sources: Sources) -> list[str]:
    """Inside a wing an import names the file: no folder above, no door of its own, no wing."""
    wrong = []
    for path in sources.of_rooms():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                there = all((path.parent / f"{name}.py").is_file() for name in names)
                wrong += [] if there and node.level == 1 else [sources.where(path, node.lineno)]
    return wrong


def foreign_libraries(sources: Sources) -> list[str]:
    return [
        f"{sources.where(path, line)} imports {name}"
        for room in ROOMS
        for path in sources.of_room(room)
        for name, line in imports(tree(path))
        if name.partition(".")[0] not in sys.stdlib_module_names | THIRD_PARTIES[room] | {"moestro"}
    ]


def eager_libraries(sources: Sources) -> list[str]:
    """Optional libraries, imported where nobody has asked for them yet."""
    return [
        f"{sources.where(path, line)} imports {name}"
        for path in sources.of_rooms()
        for name, line in set(imports(tree(path)))
        - lazy_imports(tree(path))
        - imports_for_types(tree(path))
        if name.partition(".")[0] in LAZY_LIBRARIES
    ]


def bare_rooms(sources: Sources) -> list[str]:
    """It would be found when the repository is the current folder: a second copy of the module."""
    return [
        f"{sources.where(path, line)} imports {name}"
        for path in sources.all()
        for name, line in imports(tree(path))
        if name.partition(".")[0] in ROOMS
    ]


def tensors_behind(sources: Sources, start: Path) -> list[str]:
    """Imports of tensor libraries by a file, or by what it imports of its own room."""
    waiting, seen, wrong = [start], set[Path](), list[str]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        waiting += sources.neighbours(path)
        wrong += [
            f"{sources.where(path, line)} imports {module}"
            for module, line in imports(tree(path))
            if module.partition(".")[0] in TENSOR_LIBRARIES
        ]
    return wrong


def deciding_with_tensors(sources: Sources) -> list[str]:
    paths = [sources.root / room / f"{name}.py" for room in ROOMS for name in TORCH_FREE[room]]
    return [wrong for path in sorted(paths) for wrong in tensors_behind(sources, path)]


def crowded_folders(sources: Sources) -> list[str]:
    count = Counter(path.parent for path in sources.of_rooms())
    return [f"{folder}: {held}" for folder, held in count.items() if held > MAX_FILES_OF_A_FOLDER]


def doors_that_do_more(sources: Sources) -> list[str]:
    """A door lists names and does nothing else; every folder has one."""
    folders = {path.parent for path in sources.of_rooms()}
    wrong = [f"{folder} has no door" for folder in folders if not (folder / "__init__.py").exists()]
    for door in (path for path in sources.of_rooms() if path.stem == "__init__"):
        promised, imported = list[str](), set[str]()
        for number, node in enumerate(tree(door).body):
            match node:
                case ast.Expr(value=ast.Constant(value=str())) if number == 0:
                    pass
                case ast.ImportFrom(names=names):
                    imported |= {alias.asname or alias.name for alias in names}
                case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                    promised = ast.literal_eval(value)
                case _:
                    wrong.append(f"{sources.where(door, node.lineno)} does more than list names")
        if sorted(promised) != sorted(imported):
            wrong.append(f"{sources.where(door, 1)}: __all__ is not what it imports")
    return wrong


RULES: dict[str, Rule] = {
    "past a door": past_a_door,
    "around a door": around_a_door,
    "foreign libraries": foreign_libraries,
    "eager libraries": eager_libraries,
    "bare rooms": bare_rooms,
    "deciding with tensors": deciding_with_tensors,
    "crowded folders": crowded_folders,
    "doors that do more": doors_that_do_more,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_sources_keep_the_rule(rule: str) -> None:
    assert not RULES[rule](Sources())


PLANTED = (
    ("past a door", "cache/facts/keys.py", "from moestro.engine import EngineConfig"),
    ("past a door", "engine/worker.py", "from moestro.cache.pack import Pack"),
    ("past a door", "engine/formats/int4.py", "from moestro.engine.weights import Checkpoint"),
    ("past a door", "engine/step/core.py", "from moestro.engine.planning import MemoryPlan"),
    ("past a door", "engine/step/core.py", "from moestro.engine.model.kv import PackedCache"),
    ("past a door", "server/metrics/track.py", "from moestro.server.api import Completion"),
    ("past a door", "server/api/ops.py", "from moestro.factorize import Plan"),
    ("past a door", "factorize/methods/fit.py", "from moestro.factorize import apply_plan"),
    ("around a door", "cache/lease.py", "from .policy import Lru"),
    ("around a door", "cache/pack/file.py", "from ..facts import ExpertKey"),
    ("around a door", "cache/pack/file.py", "from . import Pack"),
    ("foreign libraries", "cache/policy/lru.py", "import psutil"),
    ("eager libraries", "engine/formats/nf4.py", "import bitsandbytes"),
    ("bare rooms", "engine/step/core.py", "import cache"),
    ("deciding with tensors", "cache/policy/lru.py", "import torch"),
    ("deciding with tensors", "cache/facts/keys.py", "import numpy"),
    ("deciding with tensors", "engine/step/scheduler.py", "from .runner import Runner"),
    ("doors that do more", "cache/policy/__init__.py", "print()"),
    ("doors that do more", "cache/policy/__init__.py", "from .table import vacant"),
)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("sources")
    for path in Sources().of_rooms():
        place = copy / path.relative_to(REPO)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(path.read_text("utf-8"), "utf-8")
    return copy


@pytest.mark.parametrize(("rule", "name", "line"), PLANTED, ids=lambda part: part)
def test_the_rule_sees_what_is_planted(copied: Path, rule: str, name: str, line: str) -> None:
    path = copied / name
    whole = path.read_text("utf-8")
    path.write_text(f"{whole}\n{line}\n", "utf-8")
    try:
        assert RULES[rule](Sources(copied))
    finally:
        path.write_text(whole, "utf-8")


def test_a_crowded_folder_is_seen(copied: Path) -> None:
    planted = [copied / f"cache/traces/planted{n}.py" for n in range(MAX_FILES_OF_A_FOLDER)]
    for path in planted:
        path.write_text("", "utf-8")
    try:
        assert "cache/traces" in crowded_folders(Sources(copied))[0]
    finally:
        for path in planted:
            path.unlink()


def test_the_order_of_the_wings_is_an_order() -> None:
    """Every wing is there, and none is above itself by any way round."""
    sources = Sources()
    for room, wings in WINGS.items():
        assert {sources.wing_of(path)[1] for path in sources.of_room(room)} == wings.keys()
        placed = set[str]()
        while len(placed) < len(wings):
            free = {wing for wing in wings.keys() - placed if wings[wing] <= placed}
            assert free, f"{room}: {sorted(wings.keys() - placed)} import each other"
            placed |= free


def test_every_folder_is_packed_and_typed() -> None:
    settings = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(REPO) for path in Sources().of_rooms()}
    assert {".".join(("moestro", *folder.parts)) for folder in folders} == set(settings["packages"])
    assert all((REPO / room / "py.typed").is_file() for room in ROOMS)
