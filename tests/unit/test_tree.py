"""What holds for the repository as a whole: generated code, version floors, import contracts, forbidden things."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "protos" / "loramux" / "v1").glob("*.proto"))
GENERATED = ROOT / "client" / "loramux" / "v1"
OWN_PACKAGES = ("client/loramux", "server/loramux_base", "server/loramux_server", "trainer/loramux_trainer")


def sources() -> list[Path]:
    files = [path for package in OWN_PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in files if path.parent != GENERATED]


def project() -> dict[str, list[str]]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"base": table["dependencies"], **table["optional-dependencies"]}


def floor(requirements: list[str], name: str) -> tuple[int, ...]:
    [match] = [found for text in requirements if (found := re.match(rf"{re.escape(name)}>=([0-9.]+)", text))]
    return tuple(int(part) for part in match[1].split("."))


def stamp(pattern: str, files: str) -> tuple[int, ...]:
    """The one version that all generated files of a kind carry."""
    found = {match for path in GENERATED.glob(files) for match in re.findall(pattern, path.read_text())}
    assert len(found) == 1, f"{files} carry {sorted(found)}"
    return tuple(int(part) for part in found.pop().split("."))


class TestProtos:
    def test_every_source_has_generated_code_and_nothing_is_left_over(self) -> None:
        expected = {f"{path.stem}_pb2" for path in PROTOS}
        expected |= {f"{path.stem}_pb2_grpc" for path in PROTOS if re.search(r"^service ", path.read_text(), re.M)}
        assert {path.stem for path in GENERATED.glob("*_pb2*.py")} == expected
        assert {path.stem for path in GENERATED.glob("*_pb2*.pyi")} == expected
        for name in sorted(expected):
            importlib.import_module(f"loramux.v1.{name}")

    @pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
    def test_everything_declared_has_a_comment(self, path: Path) -> None:
        declaration = re.compile(r"^\s*(message|enum|service|rpc|oneof)\b|^\s*[\w.<>, ]+ \w+ = \d+;")
        lines = path.read_text().splitlines()
        bare = [
            f"{path.name}:{number + 1}: {line.strip()}"
            for number, line in enumerate(lines)
            if declaration.match(line) and not lines[number - 1].lstrip().startswith("//")
        ]
        assert not bare, "\n".join(bare)

    @pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
    def test_optional_fields_say_what_their_absence_means(self, path: Path) -> None:
        """An `optional` scalar is a promise that absent differs from zero, so its comment has to say how."""
        comment: list[str] = []
        silent = []
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("//"):
                comment.append(line.strip("/ "))
                continue
            if line.lstrip().startswith("optional ") and "absent" not in " ".join(comment).lower():
                silent.append(line.strip())
            comment = []
        assert not silent, "\n".join(silent)

    def test_token_ids_and_seeds_have_one_type(self) -> None:
        for path in PROTOS:
            for kind, name in re.findall(r"^\s*(?:optional |repeated )?(\w+) (\w+) = \d+;", path.read_text(), re.M):
                if name.endswith(("token_id", "token_ids")) and kind != "TokenIds":
                    assert kind == "uint32", f"{path.name}: {kind} {name}"
                if name == "seed":
                    assert kind == "uint64", f"{path.name}: {kind} {name}"


class TestVersions:
    def test_floors_are_the_versions_that_generated_the_code(self) -> None:
        gencode = stamp(r"# Protobuf Python Version: ([0-9.]+)", "*_pb2.py")
        grpc = stamp(r"GRPC_GENERATED_VERSION = '([0-9.]+)'", "*_pb2_grpc.py")
        base = project()["base"]
        assert floor(base, "protobuf") == gencode
        assert floor(base, "grpcio") == grpc
        assert floor(base, "grpcio-status") == grpc
        [protobuf] = [text for text in base if text.startswith("protobuf")]
        assert protobuf.endswith(f",<{gencode[0] + 2}"), "gencode runs on its own and on the next major of protobuf"

    def test_every_direct_dependency_is_ranged_and_pinned(self) -> None:
        pins = {
            re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if "==" in line
        }
        for requirements in project().values():
            for requirement in requirements:
                name = re.match(r"[A-Za-z0-9_.-]+?(?=[><=!~])", requirement)
                assert name is not None, f"{requirement} has no range"
                assert re.sub(r"[-_.]+", "-", name[0]).lower() in pins, f"{requirement} is not in constraints.txt"

    def test_base_dependencies_are_the_sdks_alone(self) -> None:
        names = {re.split(r"[><=]", requirement)[0] for requirement in project()["base"]}
        assert names == {"googleapis-common-protos", "grpcio", "grpcio-status", "protobuf"}


class TestSources:
    def test_nothing_runs_foreign_code(self) -> None:
        """No unpickling and no code of a checkpoint: both run what somebody else wrote."""
        for path in sources():
            tree = ast.parse(path.read_text(), filename=str(path))
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    banned = {"pickle", "cloudpickle", "dill", "shelve", "marshal"} & {n.split(".")[0] for n in names}
                    assert not banned, f"{path.relative_to(ROOT)}:{node.lineno} imports {banned}"
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    allowed = isinstance(node.value, ast.Constant) and node.value.value is False
                    assert allowed, f"{path.relative_to(ROOT)}:{node.value.lineno} trusts a checkpoint's code"
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    raise AssertionError(f"{path.relative_to(ROOT)}:{node.lineno} unpickles")

    def test_package_inits_that_the_front_end_loads_hold_a_docstring_only(self) -> None:
        for path in sources():
            package = path.relative_to(ROOT).parent
            if path.name == "__init__.py" and package.parts[0] == "server" and package.name not in {"model", "kernels"}:
                body = ast.parse(path.read_text()).body
                assert len(body) == 1, f"{path.relative_to(ROOT)} has code: importing a package must cost nothing"
                assert ast.get_docstring(ast.Module(body=body, type_ignores=[]))

    @pytest.mark.parametrize(
        "module",
        ["loramux", "loramux_base.adapter", "loramux_server.engine.messages", "loramux_server.__main__"],
    )
    def test_importing_it_brings_no_torch(self, module: str) -> None:
        program = (
            f"import {module}, sys; "
            "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes', 'accelerate'} & set(sys.modules)))"
        )
        path = f"{ROOT / 'client'}:{ROOT / 'server'}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            check=False,
            env={"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"


VIOLATIONS = [
    ("server layers", "server/loramux_server/engine/messages.py", "import loramux_server.rpc"),
    ("server layers", "server/loramux_server/tenancy/__init__.py", "import loramux_server.lora"),
    ("server layers", "server/loramux_server/text/__init__.py", "import loramux_server.tenancy"),
    ("only the SDK and rpc touch", "server/loramux_server/telemetry/__init__.py", "import loramux.v1.common_pb2"),
    ("only rpc imports grpc", "server/loramux_server/errors.py", "import grpc.aio"),
    ("only rpc imports grpc", "server/loramux_server/text/__init__.py", "import google.protobuf"),
    ("the server imports nothing of the SDK", "server/loramux_server/rpc/__init__.py", "import loramux"),
    ("engine, model and kernels know no event loop", "server/loramux_server/kernels/__init__.py", "import asyncio"),
    ("the front end's process loads no torch", "server/loramux_server/lora/__init__.py", "import torch"),
    ("processes are started", "server/loramux_server/errors.py", "import loramux_server.engine.__main__"),
    ("the SDK is small", "client/loramux/v1/__init__.py", "import numpy"),
    ("the SDK is small", "client/loramux/v1/__init__.py", "import loramux_base"),
    ("the shared package", "server/loramux_base/__init__.py", "import loramux_server.errors"),
    ("the trainer imports the SDK to publish", "trainer/loramux_trainer/errors.py", "import loramux_server.errors"),
    ("only publish uses the SDK", "trainer/loramux_trainer/errors.py", "import loramux"),
    ("nothing needs the demo", "server/loramux_base/__init__.py", "import loramux_demo"),
    ("training data is read without torch", "trainer/loramux_trainer/data/__init__.py", "import torch"),
]


class TestImportContracts:
    @staticmethod
    def lint(tree: Path) -> tuple[int, str]:
        program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
        done = subprocess.run(
            [sys.executable, "-c", program, "--no-cache"],
            check=False,
            cwd=tree,
            env={"PYTHONPATH": f"{tree / 'client'}:{tree / 'server'}:{tree / 'trainer'}", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for package in OWN_PACKAGES:
            shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        return tmp_path

    def test_the_tree_keeps_every_contract(self, tree: Path) -> None:
        code, output = self.lint(tree)
        assert code == 0, output
        assert "0 broken" in output

    @pytest.mark.parametrize(("contract", "file", "statement"), VIOLATIONS)
    def test_a_violation_is_seen(self, tree: Path, contract: str, file: str, statement: str) -> None:
        with (tree / file).open("a") as source:
            source.write(f"\n{statement}\n")
        code, output = self.lint(tree)
        assert code == 1, output
        assert re.search(rf"^{re.escape(contract)}.* BROKEN", output, re.M), output

    def test_every_contract_is_seen_to_fire(self) -> None:
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        for contract in contracts:
            assert any(contract["name"].startswith(start) for start, _, _ in VIOLATIONS), contract["name"]
