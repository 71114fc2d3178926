"The helper of chapter 19 that imports torchvision: where that is whole, half there, broken, and not there at all"
import subprocess, sys

import pytest

# What stands in torchvision/__init__.py
WHOLE = '''
import torch
from . import part
torch.library.define('torchvision::nms', '(Tensor a) -> Tensor')    # as its compiled part does
'''
HALF = '''
import torch
from . import part
@torch.library.register_fake('torchvision::nms')                    # nothing has defined it
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake('torchvision::qnms')
def qnms(dets, scores, iou_threshold): ...
'''
BROKEN = "from . import part; raise RuntimeError('some other trouble')"

SCRIPT = '''
import sys, torch
from course_lib.fastai import import_torchvision
for folder in sys.argv[1:]:
    for name in [o for o in sys.modules if o.split('.')[0]=='torchvision']: del sys.modules[name]
    sys.path[0] = folder
    try:
        tv = import_torchvision()
        print('imported', tv.part is sys.modules['torchvision.part'], import_torchvision() is tv)
    except Exception as e: print(type(e).__name__, e)
    print('declared:', *[op for op in ('nms', 'qnms') if hasattr(torch.ops.torchvision, op)])
'''

@pytest.fixture
def run(tmp_path):
    "A function that says what the helper does, in one process, with one torchvision after the other"
    def run(*inits):
        folders = [tmp_path/str(i) for i in range(len(inits))]
        for folder,init in zip(folders, inits):
            (folder/'torchvision').mkdir(parents=True)
            (folder/'torchvision'/'__init__.py').write_text(init)
            (folder/'torchvision'/'part.py').write_text("print('part is run')")
        done = subprocess.run([sys.executable, '-c', SCRIPT, *folders], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode==0, done.stderr
        return done.stdout.splitlines()
    return run

def test_missing_operators_are_declared_and_the_import_starts_afresh(run):
    assert run(HALF)==['part is run', 'part is run', 'imported True True', 'declared: nms qnms']

def test_other_errors_pass_and_a_whole_torchvision_is_left_alone(run):
    missing = "raise ModuleNotFoundError('no torchvision here')"
    assert run(BROKEN, missing, WHOLE)==['part is run', 'RuntimeError some other trouble', 'declared:',
        'ModuleNotFoundError no torchvision here', 'declared:', 'part is run', 'imported True True', 'declared: nms']
