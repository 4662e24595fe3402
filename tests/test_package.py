"""The installed package: what it says of itself, and what it says when it can't load."""

import pathlib
import re
import shutil

import torch

import wmha

PACKAGE = pathlib.Path(wmha.__file__).parent


def test_everything_public_is_documented():
    for module in (wmha, wmha.nn):
        for name in module.__all__:
            value = getattr(module, name)
            assert isinstance(value, str) or value.__doc__


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", wmha.__version__)


def test_cmake_prefix_path():
    assert list(pathlib.Path(wmha.cmake_prefix_path).rglob("wmhaConfig.cmake"))
    assert (PACKAGE / "include/wmha/attention.h").is_file()
    assert (PACKAGE / "include/wmha/nn.h").is_file()


def test_library_has_no_python_in_it():
    """It serves C++ programs and TorchScript too: no module that Python could import, no Python library linked."""
    assert not list(PACKAGE.rglob("*.pyd"))
    library = pathlib.Path(wmha.library_path)
    assert library.is_file()
    assert b"PyInit_" not in library.read_bytes()


def test_operators():
    """The contract's names, each with both temperatures; the one with a tensor is tried first."""
    for name in ("attention", "attention_with_lse", "attention_weights", "multi_head_attention"):
        assert getattr(torch.ops.wmha, name).overloads() == ["temperature_tensor", "default"]
        for overload in getattr(torch.ops.wmha, name).overloads():
            schema = getattr(getattr(torch.ops.wmha, name), overload)._schema
            options = schema.arguments[[argument.name for argument in schema.arguments].index("window_left") :]
            assert all(argument.kwarg_only for argument in options)
            assert not schema.is_mutable


def test_tags():
    def tags(operator):
        return torch.Tag.nondeterministic_seeded in operator.tags, torch.Tag.pt2_compliant_tag in operator.tags

    for name in ("attention", "attention_with_lse", "multi_head_attention", "_attention_forward"):
        assert tags(getattr(torch.ops.wmha, name).default) == (True, True)
    for name in ("attention_weights", "_attention_backward", "_dropout_mask"):
        assert tags(getattr(torch.ops.wmha, name).default) == (False, True)


def test_import_is_quiet(run_python):
    """Also with warnings as errors."""
    assert run_python("-W", "error::DeprecationWarning:wmha", "-c", "import wmha") == ""


def other_torch(package):
    build = package / "_build.py"
    build.write_text(build.read_text().replace(torch.__version__, "2.1.0"))


def no_library(package):
    (package / "lib/libwmha.so").unlink()


def broken_library(package):
    (package / "lib/libwmha.so").unlink()
    (package / "lib/libwmha.so").write_bytes(b"not a library")


def not_built(package):
    (package / "_build.py").unlink()


IMPORT = """
import sys
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    try:
        import wmha
    except ImportError as error:
        print(str(error).replace("\\n", " "))
    else:
        print("imported", wmha.__file__)
    sys.path.pop(0)
    for name in [name for name in sys.modules if name.startswith("wmha")]:
        del sys.modules[name]
"""


def test_import_errors_are_in_words(tmp_path, run_python):
    """Broken copies of the package, each imported in turn by one new process; the last copy is whole."""
    folders = []
    for damage in (other_torch, no_library, broken_library, not_built, lambda package: None):
        folders.append(tmp_path / str(len(folders)))
        shutil.copytree(PACKAGE, folders[-1] / "wmha")
        damage(folders[-1] / "wmha")
    lines = run_python("-c", IMPORT, *map(str, folders)).splitlines()
    another, missing, broken, unbuilt, whole = lines
    assert "built against torch 2.1.0" in another
    assert torch.__version__ in another
    assert "pip install" in another
    assert "libwmha.so" in missing
    assert "libwmha.so" in broken
    assert "not built" in unbuilt
    assert "pip install" in unbuilt
    assert whole == f"imported {folders[-1]}/wmha/__init__.py"
