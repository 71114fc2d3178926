"What the tests share: the repository's root, and its scripts as modules"
import importlib.util, signal
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what runs in its background with Ctrl-C ignored, and the scripts that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT)==signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

# The same made-up examples in every run and on every machine. `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile('same', derandomize=True)
settings.register_profile('search')
settings.load_profile('same')

@pytest.fixture
def root(): return ROOT

@pytest.fixture
def tool():
    "Loads a script of tools/ as a fresh module, which a test may change"
    def load(name):
        spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT/'tools'/f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load
