"""The command as a whole: its help, its exit codes, and one clear message for every foreseen failure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveal import __version__
from foveal.cli import app
from foveal.cli import main as entry
from foveal.cli.guard import explain
from foveal.cli.progress import bar
from foveal.core import info as facts
from foveal.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "tune",
    "run",
    "eval",
    "inspect",
    "bench",
    "papers",
    "reproduce",
    "patterns",
    "simulate",
    "compress",
    "train",
    "info",
)
runner = CliRunner()


def foveal(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from foveal.cli import main; main()", *words],
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_the_verbs() -> None:
    for words in ((), ("--help",), ("-h",)):
        shown = runner.invoke(app, list(words), env={"COLUMNS": "200"}).output
        for verb in VERBS:
            assert f" {verb} " in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    shown = runner.invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "Usage" in shown.output


@pytest.mark.parametrize("words", [("--help",), ("tune", "--help"), ("run", "--help"), ("papers",), ("--version",)])
def test_nothing_heavy_is_loaded_for_it(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom foveal.cli import main\n"
        "try:\n    main()\nfinally:\n    print({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("set()\n")


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output == f"foveal {__version__}\n"


def test_unknown_verb_and_option() -> None:
    assert runner.invoke(app, ["tun"]).exit_code == 2
    assert runner.invoke(app, ["info", "--jsn"]).exit_code == 2


def test_an_error_is_one_message_on_stderr() -> None:
    run = foveal("run", "nowhere.gguf", "--prompt", "[bold]x")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: model 'nowhere.gguf' does not exist")


@pytest.mark.parametrize("words", [("--debug", "papers", "show", "x"), ("papers", "show", "x", "--debug")])
def test_debug_shows_the_traceback(words: tuple[str, ...]) -> None:
    run = foveal(*words)
    assert run.returncode == 2
    assert "Traceback" in run.stderr and "error: papers: 'x' is not the slug" in run.stderr
    assert "Traceback" in foveal("papers", "show", "x", FOVEAL_DEBUG="1").stderr
    assert "Traceback" not in foveal("papers", "show", "x", FOVEAL_DEBUG="0").stderr


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    def fail() -> None:
        raise error

    monkeypatch.setattr(facts, "info", fail)
    return runner.invoke(app, ["info"])


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(KeyboardInterrupt(), monkeypatch)
    assert result.exit_code == 130  # type: ignore[attr-defined]
    assert result.stderr == "interrupted; what was computed is kept.\n"  # type: ignore[attr-defined]


def test_a_real_interruption() -> None:
    code = (
        "import os, signal, time\nfrom foveal.core import info\nfrom foveal.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts with it ignored
        "info.info = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\nmain()"
    )
    run = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, check=False)
    assert run.returncode == 130
    assert run.stderr == "interrupted; what was computed is kept.\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("a [red]b[/red]"), "error: a [red]b[/red]\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left on device. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "error: out: Permission denied.\n"),
        (ModuleNotFoundError("m", name="matplotlib.figure"), "pip install 'foveal[report]'"),
        (ModuleNotFoundError("m", name="transformers"), "pip install 'foveal[hf]'"),
        (ModuleNotFoundError("m", name="torch"), "pip install torch"),
        (MemoryError(), "out of memory; use a smaller --context"),
    ],
)
def test_foreseen_failures(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(error, monkeypatch)
    assert result.exit_code == 2  # type: ignore[attr-defined]
    assert message in result.stderr and "Traceback" not in result.output  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), ModuleNotFoundError("m", name="foveal.nowhere"), OSError("odd")]
)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(error) is None
    result = raising(error, monkeypatch)
    assert result.exception is error and result.exit_code == 1  # type: ignore[attr-defined]


def test_warnings_are_one_line_and_shown_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = warnings.showwarning

    def chatty() -> None:
        warnings.warn("foveal: the figures may not hold.", stacklevel=1)
        raise ConfigError("stop")

    monkeypatch.setattr(facts, "info", chatty)
    assert runner.invoke(app, ["info"]).stderr == "warning: the figures may not hold.\nerror: stop\n"
    assert warnings.showwarning is before


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX pipe")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-c", "from foveal.cli import main; main()", "papers"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    assert "Traceback" not in writer.stderr.read()
    writer.wait()


def test_progress_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with bar() as report:
        report("profile [x]", 0, 3)
        report("profile [x]", 1, 3)
        report("measure", 2, 3)
    assert capfd.readouterr().err == "[0/3] profile [x]\n[2/3] measure\n"


def test_the_entry_point_is_declared() -> None:
    assert 'foveal = "foveal.cli:main"' in (ROOT / "pyproject.toml").read_text()
    assert callable(entry)
