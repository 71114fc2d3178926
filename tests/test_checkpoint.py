"A fit that is killed, truly, and resumed in a new process ends with the same bits as one that never was"
import os, random, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn

from course_lib import checkpoint, conv, module
from course_lib.activations import ActivationStats
from course_lib.checkpoint import CheckpointCB, load_checkpoint, save_checkpoint
from course_lib.callbacks import EarlyStopping, GradClip, MetricsCB, SetupLearnerCB, TrackResults
from course_lib.speedrun import MixedPrecisionCB
from course_lib.core import set_seed
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.learner import Callback, Learner
from course_lib.optim import AdamW

STEPS = 13      # in an epoch: 12 batches of 16 and one of 8
EPOCHS = 3

class Jittered:
    "A dataset whose items are changed at random, with the generators of Python, NumPy and PyTorch"
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]*random.gauss(1, 0.1) + np.random.randn()*0.1 + torch.randn(())*0.1, self.y[i]

class OurModel(module.Module):
    "Of this library's modules, with dropout"
    def __init__(self):
        self.body = module.Sequential(module.Linear(10, 20), conv.BatchNorm(20), module.ReLU())
        self.head = module.Linear(20, 3)
    def forward(self, x): return self.head(F.dropout(self.body(x), 0.3, self.training))

def torch_model():
    return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 3))

def make_dls(kind):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(300, 10, generator=g)
    y = x[:,:3].argmax(1)
    train,valid = Jittered(x[:200], y[:200]),Dataset(x[200:], y[200:])
    if kind=='torch':
        order = torch.Generator().manual_seed(1)
        train_dl = torch.utils.data.DataLoader(train, 16, shuffle=True, generator=order)
        return DataLoaders(train_dl, torch.utils.data.DataLoader(valid, 64))
    return DataLoaders.from_datasets(train, valid, bs=16, seed=5 if kind=='seeded' else None)

def make_learner(kind, cbs=()):
    own = kind!='torch'
    cbs = [SetupLearnerCB('cpu'), TrackResults(), MetricsCB(top=lambda p,t: p.max(1).values.mean()), GradClip(1.),
           EarlyStopping(patience=10, min_delta=10.), ActivationStats(), *cbs]
    if kind=='seeded': cbs.append(MixedPrecisionCB(torch.float16))
    opt_func = AdamW if own else lambda params,lr: torch.optim.SGD(params, lr, momentum=0.9)
    return Learner(OurModel() if own else torch_model(), make_dls(kind), F.cross_entropy, 0.01, cbs, opt_func)

class Kill(Callback):
    "Ends the process, without a chance to clean up, at an event of a step"
    def __init__(self, event, step):
        def kill():
            if self.step_count==step: os.kill(os.getpid(), signal.SIGKILL)
        if event=='write':      # in the middle of writing a checkpoint: the file is there, its name is not yet
            replace = os.replace
            def dying(a, b):
                kill()
                replace(a, b)
            checkpoint.os.replace = dying
        elif event=='valid':
            def in_valid():
                if not self.training: kill()
            self.after_batch = in_valid
        else: setattr(self, event, kill)

def whole_state(learn):
    "All that must be the same"
    draws = [random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(3)]
    return dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), history=learn.history, draws=draws,
                memory={name: cb.state_dict() for name,cb in checkpoint._with_memory(learn.cbs).items()},
                step_count=learn.step_count, epochs=[getattr(dl, 'epoch', 0) for dl in (learn.dls.train, learn.dls.valid)])

def run(kind, folder, seed, event, step):
    "What a process does: train, perhaps be killed, and write down the end state"
    torch.set_num_threads(1)
    set_seed(seed)
    cbs = [Kill(event, step)] if event!='none' else []
    if folder: cbs.append(CheckpointCB(folder, every=5, monitor='accuracy', mode='max', resume=True))
    learn = make_learner(kind, cbs)
    learn.fit(EPOCHS)
    return whole_state(learn)

def start_process(kind, folder, seed, event='none', step=0):
    "The same in a new process"
    args = [sys.executable, __file__, kind, str(folder), str(seed), event, str(step)]
    return subprocess.Popen(args, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent.parent)})

def same(a, b, where=''):
    "Are two states equal to the last bit? Also where nan meets nan"
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys()==b.keys(), where
        for k in a: same(a[k], b[k], f'{where}/{k}')
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b), where
        for i,(v,w) in enumerate(zip(a, b)): same(v, w, f'{where}/{i}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype==b.dtype and a.shape==b.shape and a.numpy().tobytes()==b.numpy().tobytes(), where
    else: assert a==b, f'{where}: {a} and {b}'

@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def check_end(kind, folder, tmp_path):
    "The end state of the resumed process is that of a run here that nothing disturbed"
    plain = run(kind, None, 0, 'none', 0)
    save_checkpoint(plain, tmp_path/'plain.safetensors')
    same(load_checkpoint(tmp_path/'plain.safetensors'), load_checkpoint(Path(folder)/'end'))

KILLS = [('after_loss', 4), ('write', 20), ('valid', 2*STEPS)]

def test_three_kill_points(tmp_path, one_thread):
    "Killed before the first checkpoint of a step, while one is written in the second epoch, and in a validation pass"
    folders = [tmp_path/event for event,_ in KILLS]
    killed = [start_process('unseeded', folder, 0, *kill) for folder,kill in zip(folders, KILLS)]
    assert [o.wait() for o in killed] == [-signal.SIGKILL]*3
    assert list((tmp_path/'write').glob('*.part'))
    resumed = [start_process('unseeded', folder, 99) for folder in folders]
    assert [o.wait() for o in resumed] == [0]*3
    for folder in folders: check_end('unseeded', folder, tmp_path)
    assert not list(tmp_path.glob('*/*.part'))

def test_killed_three_times(tmp_path, one_thread):
    "One run with a seeded loader that is killed in its first process, and in the two that go on with it"
    folder = tmp_path/'run'
    for seed,(event,step) in enumerate([('after_backward', 8), ('after_step', 22), ('after_batch', 3*STEPS-1)]):
        assert start_process('seeded', folder, seed, event, step).wait()==-signal.SIGKILL
    assert start_process('seeded', folder, 99).wait()==0
    check_end('seeded', folder, tmp_path)

def test_torch_parts(tmp_path, one_thread):
    "A model, a loader with a generator, and an optimizer of PyTorch's"
    assert start_process('torch', tmp_path/'run', 0, 'after_pred', 2*STEPS-3).wait()==-signal.SIGKILL
    assert start_process('torch', tmp_path/'run', 99).wait()==0
    check_end('torch', tmp_path/'run', tmp_path)

class Stop(Exception): pass

class StopAt(Callback):
    def __init__(self, event, step):
        def stop():
            if self.step_count==step: raise Stop
        setattr(self, event, stop)

@pytest.mark.parametrize('every', [1, 5, STEPS, None])
def test_every_step(every, tmp_path, one_thread):
    "Stopped at each step of a run, by an exception, in this process; a checkpoint on the last batch of a pass too"
    plain = run('seeded', None, 0, 'none', 0)
    for i,step in enumerate(range(1, EPOCHS*STEPS, 2 if every==5 else 6)):
        folder = tmp_path/f'{i}'
        set_seed(0)
        with pytest.raises(Stop):
            make_learner('seeded', [CheckpointCB(folder, every=every), StopAt('after_backward', step)]).fit(EPOCHS)
        set_seed(100+step)
        learn = make_learner('seeded', [CheckpointCB(folder, every=every, resume=True)])
        learn.fit(EPOCHS)
        same(whole_state(learn), plain)

def test_checkpoints_change_nothing(tmp_path, one_thread):
    "Saving draws no random numbers and leaves no trace in the result"
    for kind in ('unseeded', 'torch'):
        plain = run(kind, None, 0, 'none', 0)
        set_seed(0)
        learn = make_learner(kind, [CheckpointCB(tmp_path/kind, every=1)])
        learn.fit(EPOCHS)
        same(whole_state(learn), plain)

def test_early_stop_is_resumed_as_stopped(tmp_path, one_thread):
    "A fit that EarlyStopping ended is ended at once when it is resumed, with the same weights"
    def learner():
        dls = make_dls('unseeded')
        cbs = [CheckpointCB(tmp_path, every=4, resume=True), EarlyStopping(patience=2, min_delta=10., restore=True)]
        return Learner(OurModel(), dls, F.cross_entropy, 0.01, cbs, AdamW)
    set_seed(0)
    first = learner(); first.fit(10)
    assert len(first.history)==6
    again = learner(); again.fit(10)
    same({'m': dict(first.model.state_dict()), 'h': first.history}, {'m': dict(again.model.state_dict()), 'h': again.history})

def test_longer_fit(tmp_path, one_thread):
    "A finished fit goes on if more epochs are asked for, as if they had been from the start"
    set_seed(0)
    make_learner('unseeded', [CheckpointCB(tmp_path)]).fit(1)
    set_seed(1)
    learn = make_learner('unseeded', [CheckpointCB(tmp_path, resume=True)])
    learn.fit(EPOCHS)
    same(whole_state(learn), run('unseeded', None, 0, 'none', 0))

def test_keeps_last_and_best(tmp_path, one_thread):
    set_seed(0)
    learn = make_learner('unseeded', [CheckpointCB(tmp_path, every=2, keep=3, monitor='accuracy', mode='max')])
    learn.fit(EPOCHS)
    assert [o.name for o in CheckpointCB(tmp_path).files()] == [f'step-{n:08}.safetensors' for n in (36, 38, 39)]
    accs = [o['accuracy'] for o in learn.history if not o['train']]
    best = load_checkpoint(tmp_path/'best.safetensors')
    assert best['best']==max(accs) and best['epoch']==accs.index(max(accs))+1

@pytest.mark.parametrize('n', [0, 7, 8, 500, -1])
def test_truncated(n, tmp_path, one_thread):
    "A file cut off anywhere is refused, and neither the learner nor the random state nor the folder changes"
    set_seed(0)
    make_learner('torch', [CheckpointCB(tmp_path, every=5)]).fit(1)
    newest = CheckpointCB(tmp_path).files()[-1]
    newest.write_bytes(newest.read_bytes()[:n])
    files = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    set_seed(1)
    learn = make_learner('torch', [CheckpointCB(tmp_path, resume=True)])
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    was = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(checkpoint.CheckpointError, match='cut off'): learn.fit(1)
    assert was == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    same(dict(learn.model.state_dict()), before)
    assert learn.history==[] and learn.step_count==0 and not learn.opt.state
    assert files == {o.name: o.read_bytes() for o in tmp_path.iterdir()}

if __name__=='__main__':
    kind,folder,seed,event,step = sys.argv[1:]
    state = run(kind, folder, int(seed), event, int(step))
    save_checkpoint(state, Path(folder)/'end')
