"""The house's rules about imports, held over the source text. CONTRIBUTING.md says why they are."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOMS = ("server", "engine", "cache", "factorize")

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
        "huggingface_hub",
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

# Files that decide. They hold integers and keys, never tensors: neither they nor what they import
# of their own room may import a tensor library.
TORCH_FREE = {
    "cache": {
        "counters",
        "errors",
        "frequency",
        "guesses",
        "host_residency",
        "keys",
        "layout",
        "link",
        "plan",
        "policy",
        "replayer",
        "residency",
        "stats",
        "table",
        "tracefile",
        "units",
    },
    "engine": {
        "advice",
        "config",
        "device_memory",
        "errors",
        "forecast",
        "manifest",
        "regret",
        "scheduler",
        "sequence",
        "stats",
        "step_size",
        "units",
    },
    "factorize": {"errors"},
    "server": {"settings"},
}
TENSOR_LIBRARIES = {"torch", "transformers", "safetensors", "numpy", "tokenizers", "gguf"}

# A model file must never be able to run code.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "torch.load", "compile"}

DRAWERS = {"utils", "common", "helpers", "base", "manager", "misc"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def files(room: str) -> list[Path]:
    return sorted((REPO / room).glob("*.py"))


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute module named by an import below `node`, with its line."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            assert child.module is not None
            if child.module == "moestro":  # from moestro import engine
                yield from ((f"moestro.{alias.name}", child.lineno) for alias in child.names)
            else:
                yield child.module, child.lineno


def lazy_imports(module: ast.Module) -> set[tuple[str, int]]:
    functions = (n for n in ast.walk(module) if isinstance(n, ast.FunctionDef))
    return {found for function in functions for found in imports(function)}


def imports_for_types(module: ast.Module) -> set[tuple[str, int]]:
    """Those below `if TYPE_CHECKING:`, which never run."""
    blocks = (n for n in ast.walk(module) if isinstance(n, ast.If))
    return {
        found
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for found in imports(block)
    }


def neighbours(path: Path) -> set[str]:
    """The files of its own room that a file imports."""
    found = set[str]()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(REPO)}:{line}"


def sources() -> list[Path]:
    tests = [p for p in (REPO / "tests").rglob("*.py") if "__pycache__" not in p.parts]
    return [path for room in ROOMS for path in files(room)] + sorted(tests)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_and_only_through_the_door(room: str) -> None:
    wrong = []
    for path in files(room):
        lazy = lazy_imports(tree(path))
        for name, line in imports(tree(path)):
            if name != "moestro" and not name.startswith("moestro."):
                continue
            allowed = set(DOORS[room])
            if (name, line) in lazy:
                allowed |= LAZY_DOORS.get(room, set())
            if name not in {f"moestro.{door}" for door in allowed}:
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_libraries_it_may(room: str) -> None:
    allowed = sys.stdlib_module_names | THIRD_PARTIES[room] | {"moestro"}
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in files(room)
        for name, line in imports(tree(path))
        if name.partition(".")[0] not in allowed
    ]
    assert not wrong


def test_optional_libraries_are_imported_where_they_are_needed() -> None:
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in (path for room in ROOMS for path in files(room))
        for name, line in set(imports(tree(path)))
        - lazy_imports(tree(path))
        - imports_for_types(tree(path))
        if name.partition(".")[0] in LAZY_LIBRARIES
    ]
    assert not wrong


def test_nobody_imports_a_room_by_its_bare_name() -> None:
    # It would be found when the repository is the current folder, as a second copy of the module.
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in sources()
        for name, line in imports(tree(path))
        if name.partition(".")[0] in ROOMS
    ]
    assert not wrong


def test_files_that_decide_import_no_tensors() -> None:
    wrong = []
    for room, names in TORCH_FREE.items():
        waiting, seen = sorted(names), set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            path = REPO / room / f"{name}.py"
            waiting += neighbours(path)
            wrong += [
                f"{where(path, line)} imports {module}"
                for module, line in imports(tree(path))
                if module.partition(".")[0] in TENSOR_LIBRARIES
            ]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_flat_typed_and_have_a_door(room: str) -> None:
    assert (REPO / room / "__init__.py").is_file()
    assert (REPO / room / "py.typed").is_file()
    below = [p for p in (REPO / room).glob("*/**/*.py") if "__pycache__" not in p.parts]
    assert not below, "setuptools packs the rooms only, not folders below them"


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_lists_names_and_does_nothing_else(room: str) -> None:
    door = tree(REPO / room / "__init__.py")
    promised, imported = list[str](), set[str]()
    for number, node in enumerate(door.body):
        match node:
            case ast.Expr(value=ast.Constant(value=str())) if number == 0:
                pass
            case ast.ImportFrom(names=names):
                imported |= {alias.asname or alias.name for alias in names}
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                promised = ast.literal_eval(value)
            case _:
                pytest.fail(f"{room}/__init__.py:{node.lineno} does more than list names")
    assert set(promised) == imported
    assert len(promised) == len(set(promised))


def test_nothing_that_can_run_code_out_of_a_file() -> None:
    wrong = []
    for path in (path for room in ROOMS for path in files(room)):
        wrong += [
            f"{where(path, line)} imports {name}"
            for name, line in imports(tree(path))
            if name.partition(".")[0] in UNSAFE_MODULES
        ]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
                wrong.append(f"{where(path, node.lineno)} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                said_no = isinstance(node.value, ast.Constant) and node.value.value is False
                wrong += [] if said_no else [f"{where(path, node.value.lineno)} trusts code"]
    assert not wrong


def handed_on(module: ast.Module) -> set[ast.expr]:
    """The `os.environ` of `{**os.environ, …}`: given to a child process whole, read by nobody."""
    return {
        value
        for node in ast.walk(module)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    }


def test_one_file_reads_the_environment() -> None:
    readers = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}
    wrong = []
    for path in (path for room in ROOMS for path in files(room)):
        if path == REPO / "server" / "settings.py":
            continue
        fine = handed_on(tree(path))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in readers:
                wrong += [] if node in fine else [where(path, node.lineno)]
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                wrong += [where(path, node.lineno) for alias in node.names if "env" in alias.name]
    assert not wrong


def test_no_drawers() -> None:
    assert not [str(path.relative_to(REPO)) for path in sources() if path.stem in DRAWERS]


def test_files_and_functions_are_short() -> None:
    long = []
    for path in sources():
        lines = len(path.read_text("utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{path.relative_to(REPO)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{where(path, node.lineno)} {node.name} has {length} lines")
    assert not long
