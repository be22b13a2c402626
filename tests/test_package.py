"""The package as a whole: its public names, the cost of its import, the direction of its imports, and the README."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lorakit
from lorakit.cli.main import VERBS
from lorakit.core.attach import adopt

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorakit"
ORDER = ["core", "formats", "bank", "view", "training", "study", "cli"]

PUBLIC = {
    *("attach", "detach", "merge", "unmerge", "disabled", "extract", "insert", "save", "load", "diagnose"),
    *("Adapter", "Bank", "TokenRows", "Update", "Report", "combine"),
    *("AdaptedLayer", "Beside", "adapts", "add_init", "Format", "add_format", "LoRASettings", "LoraError"),
    *("adapted_layers", "parameters", "parameter_groups", "bake", "dequantize", "merge_files"),
    *("peft_view", "get_peft_model"),
    *("Linear", "MergedLinear", "Embedding", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d", "LoRALayer"),
    *("TrainerMixin", "LightningCallback", "hook_accelerator"),
    *("mark_only_lora_as_trainable", "lora_state_dict", "install_as_loralib"),
}


def test_the_public_names_are_these_and_all_resolve() -> None:
    assert set(lorakit.__all__) == PUBLIC
    assert set(dir(lorakit)) == PUBLIC | {"__version__"}
    for name in PUBLIC:
        assert getattr(lorakit, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'lorakit' has no attribute 'atach'"):
        lorakit.atach  # noqa: B018
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == PUBLIC  # what type checkers see


def test_a_wheel_holds_all_files_of_the_package(tmp_path: Path) -> None:
    """Also the templates: a wheel has other files than Python's only if pyproject.toml names them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(SOURCE, tmp_path / "src" / "lorakit", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lorakit/")}
    files = {path.relative_to(tmp_path / "src").as_posix() for path in (tmp_path / "src").rglob("*") if path.is_file()}
    assert "lorakit/templates/base.html.j2" in packed
    assert packed == {name for name in files if name.startswith("lorakit/")}


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in PUBLIC if not getattr(lorakit, name).__doc__] == []


def test_imports_run_one_way() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0]
        if part not in ORDER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            depth = len(path.relative_to(SOURCE).parts)
            if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
                target = node.module.split(".")[0]
                if target in ORDER and ORDER.index(target) > ORDER.index(part):
                    wrong.append(f"{path.relative_to(SOURCE)} imports {node.module}")
    assert wrong == []


def test_core_and_formats_import_torch_and_safetensors_alone() -> None:
    allowed = {"torch", "safetensors", "lorakit", *sys.stdlib_module_names}
    for part in ("core", "formats"):
        for path in (SOURCE / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                # The one module that needs Triton is imported only if Triton is installed.
                more = {"triton"} if path.name == "triton_code.py" else set()
                assert {name.split(".")[0] for name in names} <= allowed | more, path


def test_problem_35_importing_lorakit_costs_little_over_torch() -> None:
    """0.1 s, of which a clock says little on a busy machine. What is counted is the same each time: calls of functions,
    33,000 with Python 3.11. Importing yaml makes 16,000, jinja2 39,000, matplotlib 176,000, datasets 600,000.
    """
    script = """
import sys, torch
before, calls = set(sys.modules), 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
import lorakit
lorakit.attach, lorakit.save
sys.setprofile(None)
print(calls, *sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    calls, *packages = done.stdout.split()
    assert set(packages) - sys.stdlib_module_names == {"lorakit", "safetensors"}
    assert 10_000 < int(calls) < 45_000  # fewer: not all was imported


def test_the_pages_speak_of_the_project_alone() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", "") and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(root|home|work)/[a-z.]", text), f"{name} holds a path of some machine"


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "trainable params" in capsys.readouterr().out


def test_equation_gradient_layer_and_class_swap_are_three_files_from_readme() -> None:
    """And under 400 lines: the section, linear.py, the layer's class, the function that changes the class."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Read the source\n.*?(?=^## )", text, flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    steps = re.findall(r"^\d\. .*?(?=^\d\. |\n\n)", section[0], flags=re.DOTALL | re.MULTILINE)
    files = {path for step in steps for path in re.findall(r"\]\((src/[^)#]+)", step)}
    symbols = set(re.findall(r"\[`([\w.]+)`\]", section[0]))
    assert len(steps) == len(files) == 3 and symbols >= {"plain_linear", "LoRALinear", "Linear", "adopt"}
    read = [section[0], (ROOT / "src/lorakit/core/linear.py").read_text(encoding="utf-8")]
    read += [inspect.getsource(lorakit.Linear), inspect.getsource(adopt)]
    assert sum(len(part.splitlines()) for part in read) < 400


def homes_of_two(kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> dict[str, set[str]]:
    """The public names of module-level definitions of this kind that several modules define, and these modules."""
    homes: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(path.relative_to(SOURCE).as_posix())
    return {name: own for name, own in homes.items() if len(own) > 1}


def test_the_name_of_a_class_means_one_thing() -> None:
    assert homes_of_two(ast.ClassDef) == {}


def test_the_name_of_a_function_means_one_thing() -> None:
    """Except where several modules define the same thing on purpose: what a verb, a format and a page each have."""
    verbs = {f"cli/{verb}.py" for verb in VERBS}
    formats = {"formats/loralib.py", "formats/peft.py"}
    kernels = {"core/kernels.py", "core/triton_code.py"}  # the second imports Triton, the first only when it runs
    results = {"study/analysis/report.py", "study/comparison/table.py"}
    assert homes_of_two(ast.FunctionDef) == {
        **dict.fromkeys(("add_arguments", "run"), verbs),
        "recognises": {*formats, "formats/peft_0_18.py"},
        "write": {*formats, "formats/peft_0_18.py"},
        "read": formats,
        **dict.fromkeys(("mask", "shrink", "grad_A", "grad_S_B", "add_expand_"), kernels),
        **dict.fromkeys(("tables_text", "as_json"), results),
        "render": {"training/page.py", "study/analysis/page.py", "study/comparison/page.py"},
    }


def test_what_the_library_refuses_is_a_lora_error() -> None:
    """No file has `raise ValueError(…)`."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                assert getattr(node.exc.func, "id", "") != "ValueError", f"{path}:{node.lineno}"
    assert issubclass(lorakit.LoraError, ValueError)
