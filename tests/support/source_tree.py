"""The source text of the rooms as the layering tests read it: who imports whom."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).parents[2]
ROOMS = ("server", "engine", "cache", "factorize")


def tree(path: Path) -> ast.Module:
    return _parsed(path.read_text("utf-8"))


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def imports(node: ast.AST) -> tuple[tuple[str, int], ...]:
    """Every absolute module named by an import below `node`, with its line."""
    return tuple(_imports(node))


def _imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            assert child.module is not None
            if child.module == "moestro":  # from moestro import engine
                yield from ((f"moestro.{alias.name}", child.lineno) for alias in child.names)
            else:
                yield child.module, child.lineno


@cache
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


@dataclass(frozen=True)
class Sources:
    """A folder with the four rooms in it."""

    root: Path = REPO

    def of_room(self, room: str) -> list[Path]:
        return sorted((self.root / room).rglob("*.py"))

    def of_rooms(self) -> list[Path]:
        return [path for room in ROOMS for path in self.of_room(room)]

    def all(self) -> list[Path]:
        """The tests, too."""
        tests = [p for p in (self.root / "tests").rglob("*.py") if "__pycache__" not in p.parts]
        return [*self.of_rooms(), *sorted(tests)]

    def wing_of(self, path: Path) -> tuple[str, str]:
        """Room and wing of a file; "" for the files at the top of a room."""
        room, *wing = path.relative_to(self.root).parent.parts
        return room, ".".join(wing)

    def neighbours(self, path: Path) -> set[Path]:
        """The files of its own room that a file imports names from, looked up behind the doors."""
        found = set[Path]()
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {path.parent / f"{name}.py" for name in names}
            elif (node.module or "").startswith(f"moestro.{self.wing_of(path)[0]}."):
                assert node.module is not None
                door = self.root.joinpath(*node.module.split(".")[1:]) / "__init__.py"
                found |= {behind(door, alias.name) for alias in node.names}
        return found

    def where(self, path: Path, line: int) -> str:
        return f"{path.relative_to(self.root)}:{line}"


def behind(door: Path, name: str) -> Path:
    """The file that a name comes from which a door hands on."""
    for node in tree(door).body:
        if isinstance(node, ast.ImportFrom) and name in {
            alias.asname or alias.name for alias in node.names
        }:
            return door.parent / f"{node.module}.py"
    raise AssertionError(f"{door} does not hand on {name}")
