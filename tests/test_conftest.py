"""The checks in conftest.py fail the tests that they should: these run in a pytest of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
from hive import ROOT, is_alive

LEAVERS = """
def test_process(folder): test_process.it = subprocess.Popen(['sleep', '60'])
def test_orphan(folder): subprocess.run(['sh', '-c', 'sleep 60 &'])
def test_daemon(folder): subprocess.run(['setsid', '--fork', 'env', '-i', f'HOME={folder}', 'sleep', '60'])
def test_thread(folder): threading.Thread(target=time.sleep, args=[5], daemon=True).start()
def test_socket(folder):
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(folder / 'x'))
@pytest.mark.skipif(os.geteuid() != 0, reason='needs root')
def test_mount(folder): subprocess.run(['mount', '-t', 'tmpfs', 'none', folder], check=True)
"""

TIDY = """
@pytest.fixture(scope='module')
def shell():
    with subprocess.Popen(['sh'], stdin=subprocess.PIPE) as shell:
        yield shell
def test_ended(): subprocess.Popen(['true']).wait()
def test_soon_ended(): threading.Thread(target=time.sleep, args=[0.3]).start()
def test_of_a_wider_fixture(shell):
    shell.stdin.write(b'sleep 2')
    shell.stdin.close()
"""

SKIPS = {
    "needs": "@pytest.mark.needs('no-such-program')\ndef test_it(): pass",
    "call": "def test_it(): pytest.skip('not today')",
    "module": "pytest.skip('not today', allow_module_level=True)",
    "import": "pytest.importorskip('no_such_module')",
    "xfail": "@pytest.mark.xfail(reason='known')\ndef test_it(): assert False",
    "nixos": "def test_it(): pytest.skip('needs nixos-container, which is not installed')",
}


def run_pytest(folder: Path, *args: str, environment: dict[str, str] | None = None, **bodies: str) -> str:
    """What pytest prints for test files with these bodies under the project's own conftest and settings."""
    (folder / "conftest.py").symlink_to(ROOT / "tests/conftest.py")
    for name, body in bodies.items():
        (folder / f"test_{name}.py").write_text(f"import os, pytest, socket, subprocess, threading, time\n{body}\n")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", *args, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **(environment or {})},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return ran.stdout + ran.stderr


def test_what_a_test_leaves_fails_it_and_is_ended(folder: Path) -> None:
    out = run_pytest(folder, leavers=LEAVERS, environment={"CI": ""})
    left = dict(re.findall(r"ERROR at teardown of test_(\w+) _+\nleft behind: (.*)", out))
    mount = {"mount"} if os.geteuid() == 0 else set()
    assert left.keys() == {"process", "orphan", "daemon", "thread", "socket", *mount}, out
    pids = [int(pid) for found in left.values() for pid in re.findall(r"process (\d+)", found)]
    assert len(pids) == 3, out
    assert not any(psutil.pid_exists(pid) and is_alive(psutil.Process(pid)) for pid in pids)
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


def test_what_ends_soon_or_belongs_to_a_wider_fixture_is_not_left(folder: Path) -> None:
    assert "== 3 passed in" in run_pytest(folder, tidy=TIDY)


def test_a_skip_is_a_failure_in_ci_alone(folder: Path) -> None:
    out = run_pytest(folder, "--continue-on-collection-errors", environment={"CI": "true"}, **SKIPS)
    refused = re.findall(r"^(?:FAILED|ERROR) .*test_(\w+)\.py.* - ", out, re.MULTILINE)
    assert sorted(refused) == ["call", "import", "module", "needs"], out
    (folder / "conftest.py").unlink()
    assert "== 5 skipped, 1 xfailed in" in run_pytest(folder, environment={"CI": ""}, **SKIPS)


def test_a_failure_shows_the_logs_below_its_folder(folder: Path) -> None:
    out = run_pytest(folder, fail="def test_it(folder):\n    (folder / 'a.log').write_text('it rained'); assert False")
    assert re.search(r"the end of a\.log -+\nit rained", out), out
