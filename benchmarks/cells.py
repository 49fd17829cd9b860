"""Cells: the unit of work of the benchmark, and the JSON record of a finished one.

A *cell* is one training run: a method with its settings on a task with a seed and a number of
steps. Its identifier is a pure function of everything that decides its result, so a finished cell
is recognised and never run twice, and a changed recipe never silently reuses an old result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "pytorch_optimizer", "numpy", "cg_optim")
"""Packages whose versions every record carries."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        work: name of the work (``linear``, ``lm``, ``nlu``).
        preset: name of the preset the task belongs to.
        task: name of the task inside the work.
        method: name of the method, with its options if any (``cg[damping=0.3]``).
        lr: learning rate at the start of the schedule.
        knob: value of the method's second knob, ``None`` for the method's default.
        seed: seed of adapter initialisation and data order.
        steps: number of optimizer steps; the schedule ends there.
        recipe: everything else that decides the result (sizes, rank, clipping, data identity).
        revision: a mark of the method's own version; ours changes with its defaults.
    """

    work: str
    preset: str
    task: str
    method: str
    lr: float
    knob: float | None
    seed: int
    steps: int
    recipe: str
    revision: str = ""

    @property
    def name(self) -> str:
        """A short readable file name, unique together with the task's and the method's folder."""
        knob = "" if self.knob is None else f"-k{self.knob:g}"
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"lr{self.lr:.3g}{knob}-s{self.seed}-n{self.steps}-{digest[:8]}"

    @property
    def path(self) -> Path:
        """Where the record lives, relative to the output folder."""
        folder = re.sub(r"[^\w.=,-]+", "_", self.method)
        return Path(self.work) / self.preset / self.task / folder / f"{self.name}.json"


@dataclass
class Result:
    """The record of a finished cell: what was run, on what, and what came out.

    ``status`` is ``ok``, ``diverged`` (non-finite, or final above initial held-out loss) or
    ``failed`` (the method raised, ran out of time or its process died); ``error`` says why.
    ``curve`` holds the evaluations (``step``, ``seconds``, ``choose``, ``report``), ``final`` the
    last evaluation with every metric of the task.
    """

    cell: Cell
    status: str
    error: str | None = None
    curve: dict[str, list[float]] = field(default_factory=dict)
    train: list[float] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def loss(self, half: str) -> float:
        """Final held-out loss on ``half`` (``choose`` or ``report``); infinite unless it is ok."""
        value = self.final.get(half, math.inf) if self.status == "ok" else math.inf
        return value if math.isfinite(value) else math.inf


def write_json(path: Path, payload: Any) -> None:
    """Write ``payload`` so that a reader sees the old file, the new one, but never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_finite(payload), file, indent=None, separators=(",", ":"))
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _nan(value: Any) -> Any:
    """Undo :func:`_finite` for numbers read back."""
    return math.nan if value is None else value


def save(result: Result, out: Path) -> Path:
    """Write the record of ``result`` under ``out`` and return its path."""
    path = out / result.cell.path
    write_json(path, asdict(result))
    return path


def load(path: Path) -> Result:
    """Read one record."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["cell"] = Cell(**raw["cell"])
    raw["curve"] = {key: [_nan(v) for v in values] for key, values in raw["curve"].items()}
    raw["train"] = [_nan(v) for v in raw["train"]]
    raw["final"] = {key: _nan(v) for key, v in raw["final"].items()}
    return Result(**raw)


def load_all(folder: Path) -> Iterator[Result]:
    """Read every record under ``folder``; other JSON files and broken records are passed over."""
    for path in sorted(folder.rglob("lr*.json")):
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            yield load(path)


def by_cell(results: Iterable[Result]) -> dict[Cell, Result]:
    """Index ``results`` by their cell."""
    return {result.cell: result for result in results}


def recipe_hash(settings: Mapping[str, Any]) -> str:
    """Digest of the settings that decide the results of a task."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def data_identity(folder: Path | None) -> str:
    """Name the data a task was built from: a digest of the files, or the Python they come with."""
    if folder is None:
        return f"stdlib of Python {platform.python_version()}"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.gz")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return f"files {digest.hexdigest()[:12]}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """The commit of this repository, with ``+`` if tracked files differ from it."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
        )
        return run.stdout.strip() if run.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on; never the machine's name or a path of it."""
    description: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "arch": platform.machine(),
    }
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            description["gpu"] = torch.cuda.get_device_name(0)
            description["cuda"] = torch.version.cuda
    return description


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def environment(device: str, threads: int) -> dict[str, Any]:
    """Everything about where and with what a result was made."""
    return {
        "commit": commit(),
        "versions": versions(),
        "machine": machine(device),
        "device": device,
        "threads": threads,
    }
