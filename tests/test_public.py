"""The public names: there, lazy, and what they should be."""

import subprocess
import sys

import pytest

import pyppo


@pytest.mark.parametrize("name", pyppo.__all__)
def test_each_public_name_is_there(name):
    assert getattr(pyppo, name) is getattr(pyppo, name)
    assert name in dir(pyppo)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        pyppo.trian  # noqa: B018


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_loads_nothing():
    assert python("import sys, pyppo; print('torch' in sys.modules, 'numpy' in sys.modules)") == ["False", "False"]


def test_the_kernels_load_no_environment_and_no_command_line():
    code = "import sys, pyppo; pyppo.gae; pyppo.ppo_loss; pyppo.surrogate_loss; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in python(code)}
    assert not loaded & {"envpool", "gymnasium", "tyro", "rich", "matplotlib", "safetensors"}


def test_training_loads_no_display_library_before_it_is_wanted():
    loaded = {name.split(".")[0] for name in python("import sys, pyppo; pyppo.Trainer; print(*sys.modules)")}
    assert not loaded & {"tyro", "matplotlib", "envpool"}


def test_evaluate_stays_a_function_whatever_is_imported():
    code = "import pyppo, pyppo.evaluation, pyppo.trainer, pyppo.cli; print(callable(pyppo.evaluate))"
    assert python(code) == ["True"]
