"""What lands in site-packages: built from a copy of the tree, used from another folder, with the checkout out of reach.

`wrappers/` and `callbacks/` stand at the top of the repository and install inside `sb3_qa`; every way to get this wrong
(a nested package that is not listed, a module found through the working directory, a class that pickles under another
name) shows only away from the checkout.
"""

import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where a package's modules are written, and where they install.
PACKAGES = {"sb3_qa": "sb3_qa", "wrappers": "sb3_qa/wrappers", "callbacks": "sb3_qa/callbacks"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def source_modules() -> set[str]:
    """Return the installed names of all modules in the checkout, not by way of the links inside sb3_qa/."""
    modules = set()
    for folder, installed in PACKAGES.items():
        links = [path for path in (ROOT / folder).iterdir() if path.is_symlink()]
        for path in (ROOT / folder).rglob("*.py"):
            if not any(path.is_relative_to(link) for link in links):
                modules.add(f"{installed}/{path.relative_to(ROOT / folder).as_posix()}")
    return modules


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """Run ``command`` in ``cwd`` and return what it printed; on failure, fail with all of it."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=keep | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from: building in the checkout would leave build/, and reuse a stale one."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the setuptools at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel, and nothing else, is installed in."""
    target = tmp_path_factory.mktemp("target")
    run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], cwd=target)
    return target


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that has all dependencies of this one but not its editable install of the package.

    Its one .pth file names this interpreter's site-packages, and .pth files inside those are not read.
    """
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    (site_packages,) = folder.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages")
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


# Imports everything and says where it came from; then a spawned worker, as SubprocVecEnv starts them, unpickles the
# wrappers. A class that comes back as the same object was pickled by reference, under a name the worker can import.
USE = """
import concurrent.futures, importlib, importlib.util, inspect, multiprocessing, pickle, sys
import cloudpickle

names = ["sb3_qa", "sb3_qa.policies", "sb3_qa.wrappers", "sb3_qa.callbacks"]
modules = {name: importlib.import_module(name) for name in names}
for name, module in modules.items():
    print(name, module.__file__)
for name in ("wrappers", "callbacks"):
    assert importlib.util.find_spec(name) is None, f"a top-level module {name!r} is importable"

wrappers = modules["sb3_qa.wrappers"]
classes = [getattr(wrappers, name) for name in wrappers.__all__ if inspect.isclass(getattr(wrappers, name))]
assert wrappers.VetoAction in classes, classes
with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    for cls in classes:
        assert cls.__module__.startswith("sb3_qa.wrappers"), cls.__module__
        assert pool.submit(pickle.loads, cloudpickle.dumps(cls)).result(timeout=120) is cls
"""


def use(python: Path, elsewhere: Path, **variables: str) -> dict[str, Path]:
    """Run USE in a new folder ``elsewhere`` and return the file of each package."""
    elsewhere.mkdir()
    script = elsewhere / "use.py"
    # A spawned worker imports the script of its parent again.
    script.write_text("if __name__ == '__main__':\n" + textwrap.indent(USE, "    "))
    lines = run([str(python), str(script)], cwd=elsewhere, **variables).splitlines()
    files = dict(line.split(" ", 1) for line in lines if line.startswith("sb3_qa"))
    assert set(files) == {"sb3_qa", "sb3_qa.policies", "sb3_qa.wrappers", "sb3_qa.callbacks"}, lines
    return {name: Path(file) for name, file in files.items()}


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == source_modules() | {"sb3_qa/py.typed"}


def test_wheel_carries_licence_and_readme(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in archive.read(metadata).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())


def test_nothing_lands_beside_the_package(target: Path) -> None:
    assert [path.name for path in target.iterdir() if path.suffix != ".dist-info"] == ["sb3_qa"]
    assert (target / "sb3_qa" / "py.typed").is_file()


def test_wheel_is_used_from_another_folder(target: Path, python: Path, tmp_path: Path) -> None:
    files = use(python, tmp_path / "elsewhere", PYTHONPATH=str(target))
    assert files["sb3_qa"] == target / "sb3_qa" / "__init__.py"
    assert files["sb3_qa.policies"] == target / "sb3_qa" / "policies" / "__init__.py"
    assert files["sb3_qa.wrappers"] == target / "sb3_qa" / "wrappers" / "__init__.py"
    assert files["sb3_qa.callbacks"] == target / "sb3_qa" / "callbacks" / "__init__.py"


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_editable_install_is_used_from_another_folder(copy: Path, python: Path, tmp_path: Path, links: bool) -> None:
    """Without the links as well: a checkout on a file system that has none must work too."""
    tree = tmp_path / "tree"
    shutil.copytree(copy, tree, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    if not links:
        (tree / "sb3_qa" / "wrappers").unlink()
        (tree / "sb3_qa" / "callbacks").unlink()
    install = ["install", "--no-deps", "--no-build-isolation", "-e", str(tree)]
    run([*PIP, "--python", str(python), *install], cwd=tmp_path)
    files = use(python, tmp_path / "elsewhere")
    assert {name: file.resolve() for name, file in files.items()} == {
        "sb3_qa": tree / "sb3_qa" / "__init__.py",
        "sb3_qa.policies": tree / "sb3_qa" / "policies" / "__init__.py",
        "sb3_qa.wrappers": tree / "wrappers" / "__init__.py",
        "sb3_qa.callbacks": tree / "callbacks" / "__init__.py",
    }


@pytest.mark.parametrize("name", ["wrappers", "callbacks"])
def test_links_are_relative(name: str) -> None:
    """An absolute link would point nowhere in every other clone."""
    assert os.readlink(ROOT / "sb3_qa" / name) == os.path.join("..", name)
