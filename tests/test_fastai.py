"Chapter 19 on other machines: torchvision whole, half there, broken, and not there at all; a GPU where fastai looks for one"
import os, subprocess, sys

import nbformat, pytest

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

# fastai's default device is a GPU where there is one. Here it is 'meta', whose tensors have no numbers: whatever would
# leave the CPU fails, as it does with a GPU when a batch is there and the model is not
ELSEWHERE = '''
import sys, fastai.basics, fastai.torch_core as core, torch
def default_device(use=-1):
    if use!=-1: core.defaults.use_cuda = use
    return torch.device('meta' if core.defaults.use_cuda is None else 'cpu')
for m in list(sys.modules.values()):
    if m.__name__.startswith('fastai') and hasattr(m, 'default_device'): m.default_device = default_device
for source in sys.argv[1:]: exec(source, globals())
print(learn.model.weight.device, default_device())
'''
def test_the_chapter_stays_on_the_cpu_where_its_loaders_are(root):
    cells = [c.source for c in nbformat.read(root/'nbs'/'19_fastai.ipynb', 4).cells if c.cell_type=='code']
    first = next(i for i,o in enumerate(cells) if 'validate_epoch(learn.model' in o)
    done = subprocess.run([sys.executable, '-c', ELSEWHERE, *cells[:first+1]], cwd=root/'nbs', capture_output=True, text=True,
                          env={**os.environ, 'MPLBACKEND': 'agg', 'PYTHONPATH': str(root)})
    assert done.stdout.splitlines()[-1:]==['cpu cpu'], done.stderr[-2000:]
