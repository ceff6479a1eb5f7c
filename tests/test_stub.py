"""pyppo/_C.pyi says what pyppo/_C has: the same names, and for each function arguments and results of the same types;
of a class, the same methods.

A function's docstring begins with its signature. An argument without a type is an object there, which the bindings
check by name.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pyppo import _C

STUB = ast.parse((Path(__file__).parents[1] / "pyppo" / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}

PLAIN = {  # what pybind11 takes for a C++ number, and the stub's word for it; all else is passed as an object
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "bool": "bool",
}


def signature(name: str) -> ast.FunctionDef:
    line = (getattr(_C, name).__doc__ or "").split("\n")[0]
    assert re.match(rf"{name}\(", line), f"{name}'s docstring does not begin with its signature"
    node = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def test_stub_and_module_have_the_same_names() -> None:
    assert set(FUNCTIONS) | set(CLASSES) == {name for name in vars(_C) if not name.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
def test_stub_and_class_have_the_same_methods(name: str) -> None:
    methods = {node.name for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)}
    assert methods - {"__init__"} == {method for method in vars(getattr(_C, name)) if not method.startswith("_")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stub_and_function_have_the_same_arguments(name: str) -> None:
    stub, found = FUNCTIONS[name].args, signature(name).args
    assert not stub.args, "the bindings are positional only"
    assert not stub.kwonlyargs
    assert [a.arg for a in stub.posonlyargs] == [a.arg for a in found.posonlyargs]
    for ours, theirs in zip(stub.posonlyargs, found.posonlyargs, strict=True):
        assert ours.annotation, ours.arg
        ours_type, theirs_type = ast.unparse(ours.annotation), theirs.annotation and ast.unparse(theirs.annotation)
        wanted = PLAIN.get(theirs_type or "", ours_type)
        assert ours_type == wanted, f"{ours.arg} is {ours_type} in the stub, {theirs_type} in the module"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stub_and_function_have_the_same_result(name: str) -> None:
    stub, found = FUNCTIONS[name].returns, signature(name).returns
    assert stub
    assert found
    ours, theirs = ast.unparse(stub).split("[")[0], ast.unparse(found).split("[")[0]
    assert theirs in {ours, "object"}
