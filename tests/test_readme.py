"""What the README and docs/ promise: commands parse, files exist, links resolve, code runs, recipes work."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args
from torch.distributed.run import get_args_parser as torchrun_parser

from dreamer import cli
from dreamer.config import DreamerConfig
from dreamer.models.cosmos_weights import REPOSITORIES
from dreamer.yaml_config import config_keys, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = ROOT / "docs" / "extending.md"
TOP = sorted(p.name for p in ROOT.iterdir())
# a run small enough to be made here; its folders are those of any other
SMALL = ["threads=1", "record.num_episodes=10", "evaluation.world_model.num_windows=4", "evaluation.agent.num_episodes=2"]
SMALL += [f"phase{n}.train.steps=2" for n in range(4)] + ["phase0.normalization_frames=16", "bc_long.extra_steps=2"]


# ---- reading the pages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The path that the block's first line names, if it is a file of the package."""
        found = re.match(r"# (dreamer/\S+\.py)\n", self.text)
        return found.group(1) if found else None


def blocks(page: Path, *languages: str) -> list[Block]:
    found, start, language = [], 0, None
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            if language is None:
                start, language = number, line[3:].strip()
            else:
                found.append(Block(page, start + 1, language, "\n".join(lines[start : number - 1]) + "\n"))
                language = None
    assert language is None, f"{page}: a code block from line {start} on is not closed"
    return [b for b in found if not languages or b.language in languages]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def heading_anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}


PAGE_IDS = {"argvalues": PAGES, "ids": [str(p.relative_to(ROOT)) for p in PAGES]}


# ---- commands -------------------------------------------------------------------------------------------------------------------


COSMOS = ROOT / "configs" / "minerl_cosmos.yaml"
SCRIPTS = {
    "pretokenize_dataset.py": ["pretokenize"],
    "train_phase1_cosmos.py": ["train", "phase1"],
    "train_phase2.py": ["train", "phase2"],
    "train_phase3.py": ["train", "phase3"],
}


def benchmark(name: str) -> Any:
    """The module; it finds those beside it, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


def check_command(words: list[str], with_settings: bool) -> None:
    """Raise unless this is a command that a reader can type."""
    variables = [w for w in words if re.match(r"[A-Z_]+=", w)]
    name, *rest = [w for w in words if w not in variables]
    if name == "dreamer":
        arguments = cli._parse(rest)
        if with_settings and hasattr(arguments, "overrides") and (arguments.config or arguments.preset or arguments.overrides):
            if arguments.config == Path("mine.yaml"):  # which the reader writes
                arguments.config, arguments.preset = None, "demo"
            cli._load(arguments)
    elif name == "make":
        (target,) = rest
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target
        for word in (w for w in variables if w.startswith("ARGS=")):
            assert target == "demo"
            check_command(["dreamer", "demo", *shlex.split(word.removeprefix("ARGS="))], with_settings)
    elif name.endswith("pip"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert rest[:3] == ["install", "-c", "constraints.txt"] and (ROOT / "constraints.txt").exists()
        for word in rest[3:]:
            assert word == "-e" or set(re.findall(r"[\w]+", word.removeprefix("."))) <= set(extras), word
    elif name == "python" and (parts := SCRIPTS.get(rest[0])):
        assert (ROOT / rest[0]).exists()
        # what the training scripts add to the verb's words
        path = [] if parts == ["pretokenize"] or "--data-path" not in rest else rest[(at := rest.index("--data-path")) : at + 2]
        check_command(["dreamer", *parts, *(word for word in rest[1:] if word not in path)], with_settings)
    elif name == "python" and re.fullmatch(r"benchmarks/\w+\.py", rest[0]):
        assert (ROOT / rest[0]).exists()
        benchmark(Path(rest[0]).stem).command_line().parse_args(rest[1:])
    elif name == "hf":
        folder = load_config(DreamerConfig, COSMOS).cosmos_tokenizer.checkpoint_path
        assert rest == ["download", REPOSITORIES[0], "--local-dir", str(folder)]
    elif name == "torchrun":
        at = rest.index("-m")
        assert rest[at + 1] == "dreamer"
        config_from_args(torchrun_parser().parse_args(rest[: at + 2]))
        check_command(["dreamer", *rest[at + 2 :]], with_settings)
    else:
        known = (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"], ["python", "tests/test_doc_tables.py"])
        assert words in known or words[:2] == ["tensorboard", "--logdir"], words


@pytest.mark.parametrize("page", **PAGE_IDS)
def test_every_command_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            try:
                check_command(words, with_settings=page != RECIPES)  # the recipes add settings: they are run below
            except (AssertionError, SystemExit, ValueError) as error:
                pytest.fail(f"{block}: {shlex.join(words)}: {error!r} {capsys.readouterr().err}")
    for block in blocks(page, "text"):
        for words in commands(block.text) if block.text.startswith("python benchmarks/") else ():
            try:
                check_command([word.strip("[]") for word in words], with_settings=True)  # what may be left out is in brackets
            except (AssertionError, SystemExit, ValueError) as error:
                pytest.fail(f"{block}: {shlex.join(words)}: {error!r} {capsys.readouterr().err}")
    for span in spans(page):
        words = shlex.split(span) if span.startswith(("dreamer ", "make ", "PIP_")) else []
        if len(words) > 1:
            try:
                check_command(words, with_settings=True)
            except (AssertionError, SystemExit, ValueError) as error:
                if not incomplete(words):
                    pytest.fail(f"{page}: `{span}`: {error!r} {capsys.readouterr().err}")


def incomplete(words: list[str]) -> bool:
    """A verb alone, as in "`dreamer pretokenize` encodes ..."."""
    return words[0] == "dreamer" and not any("=" in w or w.startswith("-") for w in words[1:]) and cli._parse(words[1:]) is not None


def test_a_command_that_does_not_exist_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (
        "dreamer dream --preset demo",
        "dreamer train phase1 --preset demo --steps 3",
        "dreamer train phase1 --preset demo phase1.train.stepz=3",
        "make sandwich",
        'make demo ARGS="--preset nope"',
        "pip install -c constraints.txt -e '.[nope]'",
        "python benchmarks/nothing.py",
        "python benchmarks/player.py --clock 20",
        "python benchmarks/player.py runs/demo --clocks 20",
        "python benchmarks/generation.py --precision fp8",
        "rm -rf /",
    ):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            check_command(shlex.split(text), with_settings=True)


def test_launch_files_parse_and_their_commands_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    slurm = ROOT / "docs" / "launch" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", slurm], capture_output=True).stderr == b""
    (words,) = [words for words in commands(slurm.read_text()) if words[0] == "srun"]
    values = {"$SLURM_NNODES": "2", "$head:29500": "host:29500", "$SLURM_JOB_ID": "1"}
    assert words.pop() == "&"  # the shell waits, so that a signal reaches it
    check_command([values.get(word, word) for word in words[2:]], with_settings=True)
    service, job = yaml.safe_load_all((ROOT / "docs" / "launch" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == subdomain
    assert f"--master-addr={name}-0.{subdomain}" in container["command"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2 and "--nnodes=2" in container["command"]
    check_command([word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in container["command"]], with_settings=True)
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}


@pytest.mark.parametrize(("status", "is_requeued"), [(1, True), (0, False)])
def test_slurm_queues_a_job_again_that_its_time_limit_ended(tmp_path: Path, status: int, is_requeued: bool) -> None:
    """With commands in the place of Slurm's that note what they are told: srun ends with ``status`` once scancel lets it."""
    srun = f"kill -USR1 $PPID; until grep -q scancel calls; do sleep 0.1; done; exit {status}"
    for name, does in {"srun": srun, "scontrol": "true", "scancel": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\necho {name} $1 ${{@: -1}} >> calls\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "docs" / "launch" / "slurm.sbatch"], cwd=tmp_path, env=os.environ | slurm, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "scancel --signal=TERM 7" in calls
    assert ("scontrol requeue 7" in calls) == is_requeued == (done.returncode != 0)


@pytest.mark.parametrize("page", **PAGE_IDS)
def test_every_setting_in_a_block_or_a_span_exists(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / f"{block.line}.yaml"
        file.write_text(block.text)
        load_config(DreamerConfig, file)
    if page == RECIPES:
        return
    for span in spans(page):
        if re.fullmatch(r"[a-z0-9_.]+=\S.*", span) and span.split("=")[0].split(".")[0] in DreamerConfig.model_fields:
            load_config(DreamerConfig, None, ["data.recordings.path=x", span])
        elif re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", span) and span.split(".")[0] in DreamerConfig.model_fields:
            keys = config_keys(DreamerConfig)
            free = ("env.options.", "data.recordings.options.")
            is_file = span.endswith((".py", ".md", ".yaml", ".toml", ".html", ".json", ".jsonl"))
            assert span in keys or span.startswith(free) or is_file, f"{page}: `{span}` is no setting"


# ---- files and links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", **PAGE_IDS)
def test_every_link_resolves(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert page.name != "README.md" or len(targets) > 10
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target} does not exist"
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in heading_anchors(file), f"{page}: {target}: no such heading"


@pytest.mark.parametrize("page", **PAGE_IDS)
def test_every_file_that_is_named_exists(page: Path) -> None:
    made = {block.file for block in blocks(RECIPES, "python")}
    named = 0
    for span in spans(page):
        path, _, test = span.partition("::")
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", path):
            continue
        is_path = "/" in path and path.split("/")[0] in TOP and path.split("/")[0] != "runs"
        is_file = "/" not in path and path.endswith((".md", ".toml", "Makefile"))
        if not (is_path or is_file) or path in made:
            continue
        named += 1
        assert (ROOT / path).exists(), f"{page}: {span} does not exist"
        if test:
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.M), f"{page}: {span}: no such test"
    assert named or page.name in ("README.md", "configuration.md")


def test_every_part_of_the_method_names_its_files_and_tests() -> None:
    parts = re.split(r"^## ", (ROOT / "docs" / "method.md").read_text(), flags=re.M)[1:]
    for part in parts:
        title = part.splitlines()[0]
        if title not in ("The phases", "Not implemented"):
            assert re.search(r"^Files: `dreamer/", part, flags=re.M) and part.count("`tests/") >= 3, title


def test_the_tree_shows_every_room() -> None:
    (tree,) = [b.text for b in blocks(ROOT / "README.md", "text") if b.text.startswith("dreamer/")]
    shown, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            folder = name
            shown.add(name)
        elif indent == 2:
            shown.add(f"{folder}{name}")
    for path in shown:
        assert (ROOT / path).is_dir() == path.endswith("/") and (ROOT / path).exists(), path
    package = [p for p in (ROOT / "dreamer").iterdir() if not p.name.startswith("_")]
    rooms = {f"dreamer/{p.name}/" for p in package if p.is_dir()} | {f"dreamer/{p.name}" for p in package if p.suffix == ".py"}
    assert sorted(rooms - shown) == []


def test_the_readme_is_short_and_says_nothing_of_where_it_was_written() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 280
    for page in PAGES:
        assert not re.search(r"/(work|tmp|home)/|\bTODO\b|\bTBD\b|[\U0001F300-\U0001FAFF]", page.read_text()), page


# ---- safety ---------------------------------------------------------------------------------------------------------------------


def unsafe(source: str) -> list[str]:
    """Calls and imports that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            unpickle = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas", "jsonpickle", "runpy", "code")
            found += [n for n in names if n.split(".")[0] in unpickle]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load"):
                found.append(name)
            if name.startswith("yaml.") and name.removeprefix("yaml.") in (
                "load",
                "load_all",
                "full_load",
                "unsafe_load",
                "unsafe_load_all",
            ):
                found.append(name)
            if name.endswith("import_module") and not isinstance(node.args[0], ast.Constant):  # a name that may come from a file
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(name)
            if name == "np.load" and given.get("allow_pickle") != "False":
                found.append("np.load without allow_pickle=False")
            if given.get("shell") not in (None, "False") or (name != "np.load" and given.get("allow_pickle") not in (None, "False")):
                found.append(f"{name} with shell or allow_pickle")
    return found


KNOWN_UNSAFE = {
    "envs/gym_env.py": ["importlib.import_module"],  # packages of a table beside it
    "envs/minecraft.py": ["importlib.import_module"],  # likewise: names that stand in the source
    "models/cosmos_torchscript.py": ["pickle"],  # an unpickler that knows tensors and containers alone
    "models/cosmos_weights.py": ["torch.jit.load"],  # NVIDIA's TorchScript, behind the flag trust_torchscript
}
EXAMPLES = """
import pickle, importlib
from torch import load
from importlib import import_module
torch.load(x)
torch.load(x, weights_only=flag)
np.load(y)
np.load(y, allow_pickle=True)
eval(y)
yaml.full_load(y)
importlib.import_module(values["class"])
subprocess.run(y, shell=True)
"""
HARMLESS = """
model.eval()
re.compile(x)
torch.compile(model)
torch.load(x, weights_only=True)
np.load(y, allow_pickle=False)
yaml.safe_load(y)
importlib.import_module("minari.dataset")
"""


def test_nothing_in_a_file_is_executed() -> None:
    package = ROOT / "dreamer"
    bad = {p.relative_to(package).as_posix(): found for p in package.rglob("*.py") if (found := unsafe(p.read_text()))}
    assert bad == KNOWN_UNSAFE
    assert len(unsafe(EXAMPLES)) == 9
    assert unsafe(HARMLESS) == []


# ---- code -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as ``runs/demo`` is one."""
    path = tmp_path_factory.mktemp("readme") / "runs" / "demo"
    assert cli.main(["demo", "--preset", "smoke", f"run_dir={path}", *SMALL]) == 0
    return path


def test_a_run_looks_as_the_readme_says(run: Path) -> None:
    (layout,) = [b.text for b in blocks(ROOT / "README.md", "text") if b.text.startswith("runs/demo/")]
    folders: list[str] = []
    shown = set()
    for line in layout.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        path = "".join(folders).removeprefix("runs/demo/")
        assert (run / path).exists() and (run / path).is_dir() == (path.endswith("/") or not path), path
        shown |= {path.split("/")[0], *re.findall(r"(\w+)/", line.partition("  ")[2].strip().partition("  ")[2])}
    assert {p.name for p in run.iterdir()} <= shown


def test_a_checkpoint_holds_the_files_that_architecture_names(run: Path) -> None:
    (checkpoint,) = (run / "phase3" / "checkpoints").iterdir()
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file in checkpoint.iterdir():
        assert f"| `{file.name}` |" in text


def test_every_metric_that_is_explained_is_logged(run: Path) -> None:
    rows = [json.loads(line) for file in run.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    logged = {key for row in rows for key in row}
    table = (ROOT / "docs" / "evaluation.md").read_text().split("## While training")[1].split("##")[0]
    explained = {key for line in table.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line.split("|")[1])}
    may_be_missing = {"val_reward_error_rewarded", "val_bootstrap_loss"}  # in so small a run
    assert len(explained) > 10 and explained - logged <= may_be_missing


@pytest.mark.parametrize("page", **PAGE_IDS)
def test_python_in_the_pages_runs(page: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == RECIPES:
        return  # in a copy of the package, below
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run, target_is_directory=True)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    pictures = [p for p in tmp_path.glob("*.gif")]
    assert all(p.stat().st_size > 1000 for p in pictures) and (page.name != "README.md" or len(pictures) == 1)


def apply_diff(root: Path, text: str) -> None:
    """Each hunk replaces lines that stand in the file exactly once."""
    for part in re.split(r"^--- ", text, flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        source = (root / name).read_text()
        for hunk in re.split(r"^@@\n", body, flags=re.M):
            lines = hunk.splitlines()
            assert all(line[0] in " +-" for line in lines), hunk
            old = "".join(line[1:] + "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] + "\n" for line in lines if line[0] != "-")
            assert source.count(old) == 1, f"{name} holds these lines {source.count(old)} times:\n{old}"
            source = source.replace(old, new)
        (root / name).write_text(source)


DRIVER = """
import json, shlex, sys
from dreamer.cli import main
names = {}
for kind, text in json.load(open("steps.json")):
    if kind == "python":
        exec(compile(text, "recipe", "exec"), names)
    else:
        assert main(shlex.split(text)[1:]) == 0, text
"""


def test_the_recipes_work_to_the_letter(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "dreamer", copy / "dreamer", ignore=shutil.ignore_patterns("__pycache__"))
    steps: list[tuple[str, str]] = []
    for block in blocks(RECIPES):
        if block.file:
            assert not (copy / block.file).exists()
            (copy / block.file).write_text(block.text)
        elif block.language == "diff":
            apply_diff(copy, block.text)
        elif block.language == "python":
            steps.append(("python", block.text))
        elif block.language == "bash":
            steps += [("bash", shlex.join(words)) for words in commands(block.text)]
    assert len(steps) >= 6
    (copy / "steps.json").write_text(json.dumps(steps))
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (copy / "runs" / "catch" / "thumbnail_model" / "checkpoints" / "step_00000005").is_dir()
    layers = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))
    graph = layers["import_graph"](copy / "dreamer")
    assert layers["violations"](graph) == [] and layers["circles"](graph) == []
