"""Who may import whom, read from the syntax trees: a module imports only from rows above its own."""

import ast
from pathlib import Path

import mistudio

PACKAGE = Path(mistudio.__file__).parent
ROWS = (
    {"errors", "config", "files", "progress", "mesh", "pages"},
    {"lm", "store", "sae", "metrics"},
    {"hub"},
    {"collect", "train", "evaluate", "features", "steer"},
    {"recipes", "plan", "cluster"},
    {"studio"},
    {"cli", "web"},
    {"__main__"},
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
WITHIN_ROW_0 = {("config", "errors"), ("files", "errors"), ("mesh", "errors")}


def imports(path):
    """(line, room imported) for every import of mistudio's own rooms in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mistudio":
            parts = node.module.split(".")
            rooms = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            yield from ((node.lineno, room) for room in rooms)
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from ((node.lineno, name[1]) for name in names if name[0] == "mistudio" and len(name) > 1)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_row():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms <= set(ROW_OF), rooms - set(ROW_OF)


def test_imports_point_only_at_rows_above():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = room_of(path)
        if here == "__init__":
            continue
        for line, there in imports(path):
            allowed = there == here or ROW_OF.get(there, 99) < ROW_OF[here] or (here, there) in WITHIN_ROW_0
            if there in ROW_OF and not allowed:
                wrong.append(f"{path}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_longer_than_400_lines():
    long = [str(path) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 400]
    assert not long


def test_nothing_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call, arguments = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert call not in ("pickle.load", "pickle.loads"), f"{path}:{node.lineno}"
                if call == "torch.load":
                    assert arguments.get("weights_only") == "True", f"{path}:{node.lineno}"
                if call == "np.load":
                    assert arguments.get("allow_pickle") == "False", f"{path}:{node.lineno}"
