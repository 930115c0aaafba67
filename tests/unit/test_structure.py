"""The house keeps its shape: imports point down, the command line is light, and nothing runs what it reads."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from sg_local.settings import PRESETS, STAGES, Settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sg_local"

# A module may import from lower layers, and within its own folder; so the folders of one layer never meet. A few
# modules stand at another height than their folder: a run's directory is known to the stages, the pipeline calls them.
LAYERS = [
    {"__init__", "__main__"},
    {"cli"},
    {"bench", "plan"},
    {"runs"},
    {"answers", "proof.server_check", "pull", "review", "stages"},
    {"runs.begin"},
    {"runs.given"},
    {"proof", "report"},
    {"llama", "finetune", "gguf_io"},
    {"runs.handed_out", "runs.in_flight", "runs.made_from", "runs.prompt", "runs.review", "runs.rows"},
    {"chat.modelfile", "chat.served"},
    {"selfguide"},
    {"chat"},
    {
        "runs.directory",
        "runs.lock",
        "plan.memory",
        "plan.machine",
        "plan.times",
    },  # from here on the shared vocabulary
    {"plan.sizes"},
    {"task_files.draft"},
    {"task_files.importing"},
    {"task_files.rows"},
    {"models", "task", "settings", "dimensions", "inputs"},
    {"task_files"},
    {"child"},
    {"child_process"},
    {"proof.chat_server", "download", "files", "gguf_header", "progress"},
    {"architectures", "gguf_values", "selfguide.contenders"},
    {"download_child", "errors", "escape", "runs.stage_files", "runs.process_facts"},
]
HEIGHT = {name: -depth for depth, names in enumerate(LAYERS) for name in names}

# Packages that these parts alone may import.
WALLS = {
    "llama_cpp": {"llama"},
    "gguf": {"gguf_io"},
    **dict.fromkeys(
        ("torch", "trl", "unsloth", "transformers", "peft", "datasets", "tokenizers", "bitsandbytes"),
        frozenset({"finetune"}),
    ),
    "rich": {"progress"},
    "ray": {"bench"},
    "click": {"cli"},
    "jinja2": {"chat", "report"},  # in a sandbox for templates of others; for our own page
    "matplotlib": {"report"},
    "huggingface_hub": {"download_child"},
    **dict.fromkeys(("socket", "urllib"), frozenset({"proof.chat_server"})),
    "http": {"proof.chat_server", "review"},  # a client, and a server on loopback
    "socketserver": {"review"},
}

HEAVY = {
    *("torch", "transformers", "trl", "peft", "unsloth", "datasets", "llama_cpp", "gguf", "numpy", "nltk"),
    *("scipy", "rich", "jinja2", "huggingface_hub", "rouge_score", "rapidfuzz", "matplotlib", "safetensors"),
    "ray",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def part(name: str) -> str:
    """Which part of the house a module ("runs.directory") belongs to: its folder, unless it stands by itself."""
    return next(
        (own for own in (".".join(name.split(".")[:2]), name.split(".")[0]) if own in HEIGHT), "nowhere"
    )


def dotted(path: Path) -> str:
    """sg_local/runs/directory.py -> runs.directory"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_every_module_has_its_place() -> None:
    modules = {dotted(path).removesuffix(".__init__") for path in FILES} - {"__init__"}
    assert not {name for name in modules if part(name) == "nowhere"}


def test_imports_point_down() -> None:
    wrong = []
    for path in FILES:
        importer = part(dotted(path))
        folder = importer.split(".")[0]
        for line, name in imports(parse(path)):
            head, *rest = name.split(".")
            place = f"{path.relative_to(ROOT)}, line {line}"
            if head == "sg_local":
                imported = part(".".join(rest))
                if imported != importer and HEIGHT[imported] >= HEIGHT[importer]:
                    wrong.append(f"{place}: {importer} may not import {name}")
            if head in WALLS and not {folder, importer} & WALLS[head]:
                wrong.append(f"{place}: only {' and '.join(sorted(WALLS[head]))} may import {head}")
    assert not wrong


def test_nothing_runs_what_it_reads() -> None:
    calls = {"eval", "exec", "compile", "__import__", "input", "os.system", "os.popen", "torch.load"}
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pty"}
    network = {"requests", "httpx", "ftplib", "aiohttp"}  # and those behind a wall of their own
    wrong = []
    for path in FILES:
        tree = parse(path)
        place = path.relative_to(ROOT)
        for line, name in imports(tree):
            if name.split(".")[0] in modules | network:
                wrong.append(f"{place}, line {line}: imports {name}")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) in calls:
                wrong.append(f"{place}, line {node.lineno}: calls {ast.unparse(node.func)}")
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in {"shell", "trust_remote_code"} and not is_false:
                    wrong.append(f"{place}, line {node.lineno}: {ast.unparse(keyword)}")
    assert not wrong


def test_every_module_says_first_what_it_is_for() -> None:
    silent = []
    for path in FILES:
        if path.name == "__init__.py" and not path.read_text("utf-8"):
            continue  # it only makes a package
        docstring = ast.get_docstring(parse(path)) or ""
        if len(docstring.splitlines()[0] if docstring else "") < 20:
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


def modules_after(code: str) -> set[str]:
    """The top names of the modules that are loaded after this code ran in a fresh interpreter."""
    code += "\nimport json, sys; print(json.dumps([*sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    names = json.loads(done.stderr.splitlines()[-1])
    return {name for name in names if name.startswith("sg_local")} | {name.split(".")[0] for name in names}


def test_the_command_line_is_light() -> None:
    loaded = modules_after("import sg_local.cli")
    assert not HEAVY & loaded
    # and so are the modules of the commands, which need the settings and no more
    loaded = modules_after(
        "import sg_local.cli.run, sg_local.cli.stages, sg_local.cli.predict, sg_local.cli.verify\n"
        "import sg_local.cli.models, sg_local.cli.task, sg_local.cli.doctor, sg_local.cli.plan, sg_local.cli.bench\n"
        "import sg_local.cli.explain, sg_local.cli.export_adapter, sg_local.cli.chat, sg_local.cli.report\n"
        "import sg_local.cli.compare, sg_local.cli.runs, sg_local.cli.review"
    )
    assert not HEAVY & loaded
    assert (
        not {"sg_local.runs.directory", "sg_local.models", "sg_local.task", "sg_local.runs.pipeline"} & loaded
    )


def test_the_list_of_commands_imports_none_of_them() -> None:
    """`sg-local --help` has to take no longer than half again `import click`: so nothing else is loaded."""
    loaded = modules_after(
        "from click.testing import CliRunner\n"
        "from sg_local.cli import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0"
    )
    assert {name for name in loaded if name.startswith("sg_local.")} == {
        "sg_local.cli",
        "sg_local.cli.group",
        "sg_local.errors",
        "sg_local.escape",
        "sg_local.progress",
    }


def test_the_vocabulary_is_light() -> None:
    vocabulary = [
        name
        for names in LAYERS[
            LAYERS.index({"runs.directory", "runs.lock", "plan.memory", "plan.machine", "plan.times"}) :
        ]
        for name in sorted(names)
    ]
    assert not HEAVY & modules_after("\n".join(f"import sg_local.{name}" for name in vocabulary))


def test_every_setting_is_explained() -> None:
    for item in fields(Settings):
        rule = item.metadata
        assert re.fullmatch(r"[A-Z].{20,}[.]", rule["help"]), item.name
        if item.type is str:
            assert item.default in (rule["choices"] or rule["help"]), item.name
        elif item.type is not bool:
            assert rule["low"] is not None, item.name


def test_presets_name_settings_that_exist() -> None:
    for changes in PRESETS.values():
        Settings(**changes)


def test_every_stage_has_its_module() -> None:
    for stage in STAGES:
        tree = parse(PACKAGE / "stages" / f"{stage}.py")
        assert f"run_{stage}" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_unsloth_is_imported_before_what_it_patches() -> None:
    # A formatter once sorted it behind trl; Unsloth then trains unpatched, with a warning that nobody reads.
    patched = {"torch", "transformers", "trl", "peft"}

    def function(module: str, name: str) -> ast.FunctionDef:
        nodes = ast.walk(parse(PACKAGE / "finetune" / f"{module}.py"))
        return next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)

    def heads(tree: ast.AST) -> list[tuple[int, str]]:
        return [(line, name.partition(".")[0]) for line, name in imports(tree)]

    for path in (PACKAGE / "finetune").glob("*.py"):
        at_top = [node for node in parse(path).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert not patched & {name for node in at_top for _, name in heads(node)}, path.name
    assert min(heads(function("load", "_load_with_unsloth")))[1] == "unsloth"
    train = function("train", "train_adapter")
    loads = [
        node.lineno
        for node in ast.walk(train)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_with_lora"
    ]
    assert loads
    assert all(line > loads[0] for line, name in heads(train) if name in patched)
