"""The house's rules about a single file, held over the source text."""

import ast
from collections import Counter

from source_tree import REPO, Sources, imports, tree

# A model file must never be able to run code.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "torch.load", "compile"}

DRAWERS = {"utils", "common", "helpers", "base", "manager", "misc"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def test_nothing_that_can_run_code_out_of_a_file() -> None:
    wrong = []
    for path in Sources().of_rooms():
        wrong += [
            f"{Sources().where(path, line)} imports {name}"
            for name, line in imports(tree(path))
            if name.partition(".")[0] in UNSAFE_MODULES
        ]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
                wrong.append(f"{Sources().where(path, node.lineno)} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                said_no = isinstance(node.value, ast.Constant) and node.value.value is False
                wrong += (
                    [] if said_no else [f"{Sources().where(path, node.value.lineno)} trusts code"]
                )
    assert not wrong


def test_whoever_reads_a_model_folder_says_that_its_code_is_not_run() -> None:
    """Left out, the library asks on a terminal, or goes by what the folder's files say."""
    silent = [
        Sources().where(path, node.lineno)
        for path in Sources().of_rooms()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not silent


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
    for path in Sources().of_rooms():
        if path == REPO / "server" / "facts" / "settings.py":
            continue
        fine = handed_on(tree(path))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in readers:
                wrong += [] if node in fine else [Sources().where(path, node.lineno)]
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                wrong += [
                    Sources().where(path, node.lineno)
                    for alias in node.names
                    if "env" in alias.name
                ]
    assert not wrong


def test_no_drawers() -> None:
    assert not [str(path.relative_to(REPO)) for path in Sources().all() if path.stem in DRAWERS]


def test_files_and_functions_are_short() -> None:
    long = []
    for path in Sources().all():
        lines = len(path.read_text("utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{path.relative_to(REPO)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(
                        f"{Sources().where(path, node.lineno)} {node.name} has {length} lines"
                    )
    assert not long


# A boundary behind which anything may fail, and why nobody may be taken down by it.
BROAD_EXCEPTS = {
    "engine/worker.py": 1,  # the engine's thread: the open requests are told, and it stops
    "engine/step/core.py": 1,  # one sequence's choice of a token: the others go on
    "engine/gpu_check/found.py": 1,  # one check of a GPU: the report keeps it and the others run
}


def test_anything_is_caught_at_named_boundaries_alone() -> None:
    broad = {"Exception", "BaseException"}
    found = Counter(
        str(path.relative_to(REPO))
        for path in Sources().of_rooms()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or broad
            & {ast.unparse(part) for part in ast.walk(node.type) if isinstance(part, ast.Name)}
        )
    )
    assert dict(found) == BROAD_EXCEPTS
