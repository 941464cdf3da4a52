"""The public face: names, one surface for both clients, frozen values, nothing of protobuf or gRPC in it."""

import dataclasses
import enum
import inspect
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import loramux
import loramux.testing
from loramux import _methods
from loramux._methods import Method
from loramux.v1 import adapter_pb2, generation_pb2, model_pb2

ROOT = Path(__file__).resolve().parents[3]
PAIRS = [
    (loramux.Client, loramux.AsyncClient),
    (loramux.Adapters, loramux.AsyncAdapters),
    (loramux.GenerationStream, loramux.AsyncGenerationStream),
    (loramux.AdapterWatch, loramux.AsyncAdapterWatch),
]
PUBLIC_CLASSES = [value for name in loramux.__all__ if inspect.isclass(value := getattr(loramux, name))]
DATACLASSES = [cls for cls in PUBLIC_CLASSES if dataclasses.is_dataclass(cls)]


class TestNames:
    @pytest.mark.parametrize("module", [loramux, loramux.testing], ids=lambda module: module.__name__)
    def test_all_is_sorted_and_complete(self, module: ModuleType) -> None:
        assert list(module.__all__) == sorted(module.__all__)
        public = {name for name in vars(module) if not name.startswith("_") and name not in ("testing", "v1")}
        assert public == set(module.__all__) - {"__version__"}

    def test_the_contract(self) -> None:
        for name in ["Client", "AsyncClient", "ChatMessage", "SamplingParams"]:
            assert name in loramux.__all__
        for client in PAIRS[0]:
            for name in [
                "generate",
                "batch_generate",
                "adapters",
                "with_adapter",
                "for_tenant",
                "tokenize",
                "detokenize",
                "model",
                "status",
                "cancel",
                "close",
            ]:
                assert hasattr(client, name), f"{client.__name__}.{name}"
        for adapters in PAIRS[1]:
            for name in [
                "upload",
                "promote",
                "rollback",
                "set_traffic",
                "get",
                "list",
                "versions",
                "watch",
                "preload",
                "unload",
                "pin",
                "delete",
            ]:
                assert hasattr(adapters, name), f"{adapters.__name__}.{name}"

    def test_version(self) -> None:
        table = tomllib.loads((ROOT / "pyproject.toml").read_text())
        assert loramux.__version__ == table["project"]["version"]

    def test_typed(self) -> None:
        assert (ROOT / "client" / "loramux" / "py.typed").is_file()

    def test_modules_are_private(self) -> None:
        names = {path.stem for path in (ROOT / "client" / "loramux").glob("*.py")}
        assert not [name for name in names if not name.startswith("_")]


def members(cls: type) -> dict[str, Any]:
    dunder = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}
    return {
        dunder.get(name, name): value
        for base in reversed(cls.__mro__[:-1])
        for name, value in vars(base).items()
        if not name.startswith("_") or name in dunder or name in dunder.values() or name == "__init__"
    }


class TestOneSurface:
    @pytest.mark.parametrize(("sync", "asyncio"), PAIRS, ids=lambda cls: cls.__name__)
    def test_names_and_signatures(self, sync: type, asyncio: type) -> None:
        ours, theirs = members(sync), members(asyncio)
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            other = theirs[name]
            assert isinstance(value, property) == isinstance(other, property), name
            if isinstance(value, property):
                continue
            first, second = inspect.signature(value).parameters, inspect.signature(other).parameters
            assert [(p.name, p.kind, p.default) for p in first.values()] == [
                (p.name, p.kind, p.default) for p in second.values()
            ], name

    @pytest.mark.parametrize(("sync", "asyncio"), PAIRS, ids=lambda cls: cls.__name__)
    def test_answers_have_one_type(self, sync: type, asyncio: type) -> None:
        """The answers of both are equal, but for the twins themselves and the asyncio kinds of iterators."""
        twins = {ours.__name__: theirs.__name__ for ours, theirs in PAIRS}

        def spell(value: Any) -> str:
            text = str(get_type_hints(value).get("return"))
            kinds = r"collections\.abc\.(?:Async)?(?:Generator|Iterator)\[([^\]]*?)(?:, NoneType|, None)*\]"
            text = re.sub(kinds, r"\1", text)
            for ours, theirs in twins.items():
                text = re.sub(rf"\b{theirs}\b", ours, text)
            return text.replace("_async_", "_")

        ours, theirs = members(sync), members(asyncio)
        for name, value in ours.items():
            if not isinstance(value, property):
                assert spell(value) == spell(theirs[name]), name

    @pytest.mark.parametrize(("sync", "asyncio"), PAIRS, ids=lambda cls: cls.__name__)
    def test_everything_is_documented_alike(self, sync: type, asyncio: type) -> None:
        theirs = members(asyncio)
        for name, value in members(sync).items():
            if name == "__init__":
                continue
            assert value.__doc__, name
            first = [line.split()[0] for line in value.__doc__.splitlines() if line.strip()]
            second = [line.split()[0] for line in theirs[name].__doc__.splitlines() if line.strip()]
            assert first[0] == second[0], name


class TestValues:
    @pytest.mark.parametrize("cls", DATACLASSES, ids=lambda cls: cls.__name__)
    def test_frozen_slotted_and_by_keyword(self, cls: type) -> None:
        params: Any = vars(cls)["__dataclass_params__"]
        assert params.frozen
        assert "__slots__" in vars(cls)
        positional = [
            p.name
            for p in inspect.signature(cls).parameters.values()
            if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        allowed = {"ChatMessage": ["role", "content"], "ChatPrompt": ["messages"], "BatchRequest": ["prompt"]}
        assert positional == allowed.get(cls.__name__, [])

    @pytest.mark.parametrize("cls", DATACLASSES, ids=lambda cls: cls.__name__)
    def test_every_field_is_documented(self, cls: type) -> None:
        documented = set(re.findall(r"^\s{4,}(\w+):", cls.__doc__ or "", re.M))
        missing = {field.name for field in dataclasses.fields(cls)} - documented
        assert not missing

    def test_raw_is_out_of_sight(self) -> None:
        for cls in DATACLASSES:
            for field in dataclasses.fields(cls):
                if field.name == "raw":
                    assert not field.repr and not field.compare


def parts(hint: Any) -> Iterator[Any]:
    """Every type that an annotation mentions."""
    yield hint
    if get_origin(hint) is not None or isinstance(hint, UnionType):
        if (origin := get_origin(hint)) is not None:
            yield origin
        for argument in get_args(hint):
            yield from parts(argument)
    elif isinstance(hint, list | tuple):
        for argument in hint:
            yield from parts(argument)


class TestNoLeak:
    @pytest.mark.parametrize("cls", PUBLIC_CLASSES, ids=lambda cls: cls.__name__)
    def test_annotations_name_no_protobuf_and_no_grpc(self, cls: type) -> None:
        hints: list[tuple[str, Any]] = []
        if dataclasses.is_dataclass(cls) or typing.is_typeddict(cls):
            hints += get_type_hints(cls).items()
        if not issubclass(cls, enum.Enum):
            for name, value in members(cls).items():
                # Streams and helpers are made by the client; their constructors are nobody's surface.
                if name == "__init__" and cls not in (*PAIRS[0], *DATACLASSES):
                    continue
                function = value.fget if isinstance(value, property) else value
                if inspect.isfunction(function):
                    hints += [(f"{name}.{key}", hint) for key, hint in get_type_hints(function).items()]
        for where, hint in hints:
            for part in parts(hint):
                module = getattr(part, "__module__", "") or ""
                assert not module.startswith(("grpc", "google.", "loramux.v1")), f"{cls.__name__}.{where}: {part}"

    def test_errors_are_no_grpc_errors(self) -> None:
        for cls in PUBLIC_CLASSES:
            for base in cls.__mro__:
                assert not base.__module__.startswith(("grpc", "google."))


class TestMethods:
    def test_the_table_is_that_of_the_protos(self) -> None:
        table = {value.path: value for value in vars(_methods).values() if isinstance(value, Method)}
        served = {
            f"/{service.full_name}/{method.name}": method
            for file in (generation_pb2, adapter_pb2, model_pb2)
            for service in file.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        }
        assert set(table) == set(served)
        for path, method in served.items():
            assert table[path].request.DESCRIPTOR is method.input_type
            assert table[path].response.DESCRIPTOR is method.output_type


@pytest.mark.parametrize("module", ["loramux", "loramux.testing"])
def test_import_is_light(module: str) -> None:
    heavy = ["torch", "numpy", "transformers", "opentelemetry", "loramux_server", "pytest"]
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "client")},
    )
    assert done.stdout.strip() == "[]"
