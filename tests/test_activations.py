"What a notebook cannot show of the callbacks that look inside: models of all kinds, fits that fail, numbers of all formats"
import copy, subprocess, sys

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from course_lib import module
from course_lib.activations import ActivationStats, GradientStats, _row
from course_lib.callbacks import GradAccumulation, GradClip
from course_lib.core import set_seed
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.learner import Callback, CancelBatchException, CancelFitException, Learner
from course_lib.schedule import lr_find

def make_learner(model, cbs=None, loss_func=F.cross_entropy, n=40, bs=8, **kwargs):
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))
    return Learner(model, DataLoaders(DataLoader(ds, bs), DataLoader(ds, bs)), loss_func, 0.1, cbs, **kwargs)

def ours(): return module.Sequential(module.Linear(4, 5), module.ReLU(), module.Linear(5, 3))
def torchs(): return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
both = pytest.mark.parametrize('make', [ours, torchs])

def n_hooks(model): return sum(len(getattr(m, '_forward_hooks', None) or getattr(m, '_hooks', None) or {}) for m in model.modules())

def test_light_import():
    "The module pulls in nothing heavy"
    code = "import sys, course_lib.activations; print([o for o in ('matplotlib', 'pandas', 'fastai', 'IPython') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

# What is measured

@settings(deadline=None, max_examples=60)
@given(shape=st.sampled_from([(), (5,), (1,), (3,4), (1,1), (2,3,4), (2,3,4,2)]), scale=st.floats(1e-4, 1e4),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), seed=st.integers(0, 99))
def test_statistics_are_numpys(shape, scale, dtype, seed):
    "For outputs of any shape and format the numbers are those of numpy, in float32"
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()*scale).to(dtype)
    row,a = _row(x, 7, 2.5),x.to(torch.float32).numpy()
    assert row.dtype==torch.float32 and row.shape==(10,)
    units = np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) if a.ndim>1 else a.reshape(-1, 1)
    hist = np.histogram(np.clip(np.abs(a.astype(np.float64)), 0, 2.5), 7, (0, 2.5))[0]/a.size
    np.testing.assert_allclose(row[:3], [a.mean(dtype=np.float64), a.std(dtype=np.float64), (units==0).all(1).mean()], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(row[3:].cumsum(0), hist.cumsum(), atol=1.01/a.size)      # one value may lie on an edge

def test_numbers_too_large():
    "Infinite values are in the last bar; a nan makes mean, deviation and dead share nan, not a share of 0"
    row = _row(torch.tensor([[1., torch.inf], [0., 2.]]), 5, 5.)
    assert row[3:].tolist()==[0.25, 0.25, 0.25, 0, 0.25]
    assert _row(torch.full((4, 2), torch.nan), 5, 5.)[:3].isnan().all()
    half = torch.full((4096,), 300., dtype=torch.float16)       # neither their sum nor their squares fit into a half
    assert _row(half, 5, 5.)[0]==300 and _row(half, 5, 5.)[1]==0

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats(dtype):
    class Cast(nn.Module):
        def forward(self, x): return x.to(dtype)
    stats = ActivationStats(Cast)
    make_learner(nn.Sequential(nn.Linear(4, 3), Cast()), stats, lambda p,t: F.cross_entropy(p.float(), t)).fit(1)
    assert stats.stat('std').dtype==torch.float32 and not stats.stat('std').isnan().any()

def test_other_defaults():
    "Default device and default dtype change nothing"
    before = torch.get_default_dtype()
    stats = ActivationStats()
    make_learner(torchs(), stats).fit(1)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device('meta'): out = stats.stat('hist')
    finally: torch.set_default_dtype(before)
    assert (out.dtype, out.device.type, out.shape)==(torch.float32, 'cpu', (3, 5, 40))

# Which layers, and how often they are called

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.r,self.unused = nn.LSTM(4, 3, batch_first=True),nn.Linear(2, 2)
    def forward(self, x): return self.r(x[:,None])[0][:,0]

class InADict(nn.Module):
    def forward(self, x): return {'what': 'text', 'out': x, 'other': x*0}

class Unpack(nn.Module):
    def forward(self, o): return o['out']

def test_nested_outputs():
    "Of a tuple or a dict the first tensor counts; what gives no tensor has nan"
    stats = ActivationStats()
    make_learner(Recurrent(), stats).fit(1)
    assert list(stats.rows())==['r LSTM', 'unused Linear']
    assert not stats.stat('std')[0].isnan().any() and stats.stat('std')[1].isnan().all()
    model = nn.Sequential(nn.Linear(4, 3), InADict(), Unpack())
    make_learner(model, stats).fit(1)
    torch.testing.assert_close(stats.stat('mean')[0], stats.stat('mean')[1])

@pytest.mark.parametrize('lib', [module, nn])
def test_called_twice(lib):
    "A layer called twice in a batch has two rows, each like that of a layer of its own"
    def model(shared):
        set_seed(0)
        linear,relus = [lib.Linear(4, 4) for _ in range(3)],[lib.ReLU() for _ in range(2)]
        return lib.Sequential(linear[0], relus[0], linear[1], relus[0 if shared else 1], linear[2])
    a,b = ActivationStats(lib.ReLU),ActivationStats(lib.ReLU)
    make_learner(model(True), a).fit(1); make_learner(model(False), b).fit(1)
    assert list(a.rows())==['1 ReLU', '1 ReLU, call 2'] and list(b.rows())==['1 ReLU', '3 ReLU']
    torch.testing.assert_close(a.stat('hist'), b.stat('hist'))

class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.n = nn.Linear(4, 3),nn.Identity(),0
    def forward(self, x):
        self.n += self.training
        for _ in range(self.n-1): x = self.b(x)
        return self.a(x)

def test_called_now_and_then():
    "Columns are batches: where a layer was not called there is nan"
    stats = ActivationStats(names=['b'])
    make_learner(Sometimes(), stats, n=24).fit(1)
    assert stats.stat('std').isnan().tolist()==[[True, False, False], [True, True, False]]

def test_which_layers():
    model = ours()
    for kwargs,wanted in [({}, ['0 Linear', '1 ReLU', '2 Linear']), (dict(kinds=module.ReLU), ['1 ReLU']),
                          (dict(kinds=[module.ReLU]), ['1 ReLU']), (dict(names=['2']), ['2 Linear']), (dict(names='2'), ['2 Linear']),
                          (dict(kinds=(module.ReLU,), names=['0', '']), ['Sequential', '0 Linear', '1 ReLU'])]:
        stats = ActivationStats(**kwargs)
        make_learner(model, stats).fit(1)
        assert list(stats.rows())==wanted
    stats = ActivationStats()
    make_learner(nn.Linear(4, 3), stats).fit(1)
    assert list(stats.rows())==['Linear']

class Bare:
    def __init__(self): self.w = torch.zeros(4, 3, requires_grad=True)
    def parameters(self): return [self.w]
    def __call__(self, x): return x@self.w

def compiled_in_place():
    model = torchs()
    model[0].compile()
    return model

@pytest.mark.parametrize('make,kwargs,says', [
    (lambda: torch.compile(torchs()), {}, 'the model is compiled'), (compiled_in_place, {}, "layer '0' is compiled"),
    (lambda: nn.Sequential(torch.compile(nn.Linear(4, 3))), {}, "layer '0' is compiled"), (Bare, {}, 'a Bare has no named_modules'),
    (ours, dict(names=['0', '3']), "no layer '3'"), (torchs, dict(names=['linear']), "no layer 'linear'"),
    (torchs, dict(names=[0]), 'no layer 0'), (torchs, dict(names=2), 'no layer 2'), (ours, dict(kinds=(nn.Conv2d,)), r"no layer of the kinds .*torch.nn.modules.conv.Conv2d.*it has .*course_lib.module.ReLU")])
def test_refused(make, kwargs, says):
    "Before the fit, by name, and without a hook left behind"
    model = make()
    learn = make_learner(model, ActivationStats(**kwargs))
    with pytest.raises((TypeError, ValueError), match=says): learn.fit(1)
    assert learn.step_count==0
    if hasattr(model, 'modules'): assert n_hooks(model)==0

@pytest.mark.parametrize('kinds', ['ReLU', ['ReLU'], nn.ReLU(), [module.ReLU, module.ReLU()]])
def test_kinds_are_classes(kinds):
    "A name or a layer in the place of a class is refused by name"
    with pytest.raises(TypeError, match='kinds are classes.*names='): make_learner(ours(), ActivationStats(kinds)).fit(1)

def test_the_other_librarys_relu_is_told_apart():
    "Two classes are called ReLU: the message says which was asked for, and which the model has"
    with pytest.raises(ValueError, match=r"torch.nn.modules.activation.ReLU.*course_lib.module.ReLU"):
        make_learner(ours(), ActivationStats(nn.ReLU)).fit(1)

@pytest.mark.parametrize('kwargs', [dict(bins=0), dict(bins=2.5), dict(top=0), dict(top=float('nan')), dict(bins=True)])
def test_numbers_refused(kwargs):
    with pytest.raises((TypeError, ValueError), match=f'ActivationStats: {next(iter(kwargs))}'): ActivationStats(**kwargs)

# Fits of all kinds

class At(Callback):
    "Raises an error at an event"
    def __init__(self, event, error): setattr(self, event, self.fail); self.error = error
    def fail(self): raise self.error

@both
@pytest.mark.parametrize('error', [RuntimeError('no'), KeyboardInterrupt(), CancelFitException()])
@pytest.mark.parametrize('event', ['before_fit', 'before_batch', 'after_pred', 'after_loss', 'after_epoch', 'cleanup_epoch'])
def test_hooks_always_removed(make, event, error):
    model,stats = make(),ActivationStats()
    try: make_learner(model, [stats, At(event, error)]).fit(1)
    except (RuntimeError, KeyboardInterrupt, CancelFitException): pass
    assert n_hooks(model)==0 and stats.handles==[]

@both
def test_a_second_fit_begins_afresh(make):
    stats,again = ActivationStats(),ActivationStats()
    learn = make_learner(make(), stats)
    learn.fit(3)
    assert stats.stat('mean').shape==(3, 15)
    learn.fit(2, cbs=again)
    assert stats.stat('mean').shape==(3, 10)
    torch.testing.assert_close(stats.stat('hist'), again.stat('hist'))

@both
def test_only_the_training_pass_counts(make):
    "Neither validation, nor predictions in between, nor other calls of the model"
    class Busy(Callback):
        def after_loss(self): self.model(self.xb)
        def after_batch(self): self.learner.predict(torch.randn(2, 4))
    stats,quiet = ActivationStats(),ActivationStats()
    for cbs in ([stats, Busy()], [quiet]):
        set_seed(0)
        make_learner(make(), cbs).fit(2)
    assert list(stats.rows())==['0 Linear', '1 ReLU', '2 Linear']
    torch.testing.assert_close(stats.stat('hist'), quiet.stat('hist'))
    learn = make_learner(make(), stats)
    learn.fit(1, train=False)
    assert stats.stat('mean').shape==(3, 0)
    with pytest.raises(ValueError, match='no training batch'): stats.plot_hists()

def test_a_cancelled_batch_has_nan():
    class Skip(Callback):
        order = 5
        def before_batch(self):
            if self.iter==1: raise CancelBatchException
    stats = ActivationStats()
    make_learner(torchs(), [stats, Skip()], n=24).fit(1)
    assert stats.stat('std').isnan().tolist()==[[False, True, False]]*3

def test_recomputed_activations_count_once():
    "Gradient checkpointing calls the layers again in the backward pass"
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU()),nn.Linear(5, 3)
        def forward(self, x): return self.head(checkpoint(self.body, x, use_reentrant=False))
    stats = ActivationStats()
    make_learner(Saving(), stats).fit(1)
    assert list(stats.rows())==['body.0 Linear', 'body.1 ReLU', 'head Linear']

@both
def test_a_copy_of_the_model_does_not_report(make):
    "A running average of the weights, say, copies the model in the middle of a fit"
    class Copy(Callback):
        def before_batch(self): self.twin = copy.deepcopy(self.model)
        def after_batch(self): self.twin(self.xb)
    stats = ActivationStats()
    make_learner(make(), [stats, Copy()]).fit(1)
    assert list(stats.rows())==['0 Linear', '1 ReLU', '2 Linear']

def test_a_sweep_leaves_no_trace():
    stats,grads = ActivationStats(),GradientStats()
    learn = make_learner(torchs(), [stats, grads], n=400)
    learn.fit(1)
    before = stats.stat('hist'),grads.rms()
    lr_find(learn, n=20, plot=False)
    assert n_hooks(learn.model)==0
    torch.testing.assert_close((stats.stat('hist'), grads.rms()), before)

@both
def test_watching_changes_nothing(make):
    ends = []
    for cbs in ([], [ActivationStats(), GradientStats()]):
        set_seed(0)
        learn = make_learner(make(), cbs)
        learn.fit(2)
        ends.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a,b in zip(*ends))

# Gradients

class Keep(Callback):
    "Keeps the gradients at an event order between the accumulation and the clipping"
    order = -2
    def __init__(self): self.found = []
    def after_backward(self): self.found.append([p.grad.clone() for p in self.model.parameters() if p.ndim>1])

@both
def test_gradients_are_complete_and_not_clipped(make):
    grads,keep = GradientStats(),Keep()
    make_learner(make(), [GradClip(1e-3), grads, GradAccumulation(2), keep]).fit(1)
    assert list(grads.weights)==['0.weight', '2.weight']
    expected = torch.tensor([[np.sqrt((o.double()**2).mean().item()) for o in step] for step in keep.found]).T
    torch.testing.assert_close(grads.rms(), expected.float())
    assert grads.rms().shape==(2, 3) and grads.rms().min()>1e-3

def test_gradients_of_frozen_and_bare_models():
    model,grads = torchs(),GradientStats()
    model[0].requires_grad_(False)
    learn = make_learner(model, grads)
    assert grads.rms().shape==(0, 0)
    learn.fit(1); learn.fit(1)
    assert grads.rms().isnan().all(1).tolist()==[True, False] and grads.rms().shape==(2, 5)
    make_learner(Bare(), grads).fit(1)
    assert list(grads.weights)==['0'] and grads.rms().shape==(1, 5)

def test_gradients_refused():
    class Biases(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(4))
        def forward(self, x): return x + self.b
    with pytest.raises(ValueError, match='no weights'): make_learner(Biases(), GradientStats()).fit(1)
    with pytest.raises(ValueError, match='no step'): GradientStats().plot()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    "The same numbers, and nothing is left on the device after a pass"
    from course_lib.callbacks import SetupLearnerCB
    found = []
    for device in ('cpu', 'cuda'):
        set_seed(0)
        stats,grads = ActivationStats(),GradientStats()
        make_learner(ours(), [SetupLearnerCB(device), stats, grads]).fit(1)
        assert all(row.device.type=='cpu' for rows in stats.rows().values() for row in rows.values())
        found.append((stats.stat('std'), stats.stat('dead'), grads.rms()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
