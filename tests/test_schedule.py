"What 14_schedule cannot show in a cell: schedules over all lengths, and a sweep that leaves no trace in other set-ups"
import math, random

import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.optim import lr_scheduler

from course_lib import optim
from course_lib.checkpoint import CheckpointCB
from course_lib.core import set_seed, test_near
from course_lib.dataloader import DataLoaders, Dataset
from course_lib.learner import Callback, CancelBatchException, CancelFitException, Learner, get_hyper
from course_lib.losses import cross_entropy, mse
from course_lib.schedule import CosineAnneal, LRFinder, OneCycle, Schedule, cosine, linear, lr_find

steady = settings(max_examples=60, deadline=None, derandomize=True, database=None)
def near(a, b, **kwargs): test_near(np.array(a), np.array(b), **kwargs)     # in double precision

lengths,factors = st.integers(1, 200),st.floats(0.01, 0.9)

def torch_values(make, n, key='lr', lr=0.5):
    "What a scheduler of PyTorch has set before each of `n` steps, and after the last"
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9)
    sched,out = make(opt),[]
    for i in range(n+1):
        out.append(opt.param_groups[0][key])
        if i==n: return out
        opt.step()
        sched.step()

def ours(f, n, scale=1.): return [scale*f(i/n) for i in range(n+1)]

@steady
@given(lengths, factors, factors, factors, st.sampled_from(['linear','cos']))
@example(1, 0.5, 0.1, 0.1, 'linear')
def test_one_cycle_is_torchs(n, pct, start, end, strategy):
    def make(opt):
        return lr_scheduler.OneCycleLR(opt, 0.5, total_steps=n+1, pct_start=(pct*n+1)/(n+1), anneal_strategy=strategy,
                                       div_factor=1/start, final_div_factor=start/end, base_momentum=0.8, max_momentum=0.95)
    sched = OneCycle(pct, start, end, cosine if strategy=='cos' else linear, moms=(0.95, 0.8))
    near(ours(sched, n, 0.5), torch_values(make, n), eps=1e-9)
    near(ours(sched.mom, n), torch_values(make, n, 'momentum'), eps=1e-9)

@steady
@given(lengths, st.floats(0, 1))
def test_cosine_is_torchs(n, end):
    near(ours(CosineAnneal(end), n, 0.5),
         torch_values(lambda o: lr_scheduler.CosineAnnealingLR(o, n, eta_min=0.5*end), n), eps=1e-9)

@steady
@given(lengths, factors, st.floats(0, 1))
def test_linear_is_torchs(n, start, end):
    near(ours(Schedule(lambda pos: linear(start, end, pos)), n, 0.5),
         torch_values(lambda o: lr_scheduler.LinearLR(o, start, end, n), n), eps=1e-9)

@steady
@given(lengths, st.integers(1, 4))
def test_polynomial_is_torchs(n, power):
    near(ours(Schedule(lambda pos: (1-pos)**power), n, 0.5),
         torch_values(lambda o: lr_scheduler.PolynomialLR(o, n, power), n), eps=1e-9)

def data(n=60, bs=8, seed=None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=g)
    ds = Dataset(x, (x.sum(1)>0).long())
    return DataLoaders.from_datasets(ds, ds, bs=bs, seed=seed)

def learner(opt_func=optim.SGD, dls=None, cbs=None):
    return Learner(nn.Linear(5, 2), dls or data(), cross_entropy, 0.1, cbs, opt_func)

@steady
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 20))
def test_a_schedule_spans_the_fit(n_epochs, n, bs):
    learn,sched = learner(dls=data(n, bs)),OneCycle()
    learn.fit(n_epochs, lr=2., cbs=sched)
    n_steps = n_epochs*math.ceil(n/bs)
    near(sched.lrs, ours(sched, n_steps, 2.)[:-1], eps=1e-12)
    assert get_hyper(learn.opt, 'lr')==2.

class Every(Callback):
    "Gradient accumulation: a step only at every second batch"
    def after_backward(self):
        if self.iter%2==0: raise CancelBatchException()

class Skips(Callback):
    def before_batch(self):
        if self.iter<3: raise CancelBatchException()

class StartsAt(Callback):
    def before_fit(self): self.learner.start_epoch = 1

def test_cancelled_batches_do_not_stretch_it():
    all_lrs = ours(CosineAnneal(), 16)[:-1]
    for cb,kept in [(Every(), all_lrs[1::2]), (Skips(), all_lrs[3:8]+all_lrs[11:])]:
        sched = CosineAnneal()
        learner().fit(2, lr=1., cbs=[sched, cb])
        near(sched.lrs, kept, eps=1e-12)

def test_a_resumed_fit_goes_on_at_the_right_place(tmp_path):
    def run(folder, fails_at=None, resume=False):
        set_seed(0)
        learn,sched = learner(optim.Adam, data(seed=1)),OneCycle(moms=(0.95,0.85))
        cbs = [sched, CheckpointCB(folder, every=2, resume=resume)] + [Fails(KeyboardInterrupt, fails_at)]*bool(fails_at)
        try: learn.fit(3, lr=0.1, cbs=cbs)
        except KeyboardInterrupt: assert fails_at
        return learn,sched
    whole,sched = run(tmp_path/'a')
    run(tmp_path/'b', fails_at=13)
    rest,again = run(tmp_path/'b', resume=True)
    assert len(sched.lrs)==24 and again.lrs==sched.lrs and again.moms==sched.moms
    for a,b in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(a, b)

class Fails(Callback):
    "Fails, or ends the fit, after some steps"
    def __init__(self, kind, at=5): self.kind,self.left = kind,at
    def after_step(self):
        self.left -= 1
        if self.left==0: raise self.kind('enough')

@pytest.mark.parametrize('kind', [CancelFitException, RuntimeError, KeyboardInterrupt])
def test_lr_and_momentum_come_back_also_after_an_early_end(kind):
    learn = learner(lambda p, lr: optim.SGD(p, lr, mom=0.3))
    try: learn.fit(2, lr=0.7, cbs=[OneCycle(moms=(0.95,0.85)), Fails(kind)])
    except (RuntimeError, KeyboardInterrupt): pass
    assert (learn.opt.lr, learn.opt.mom)==(0.7, 0.3)

def test_no_momentum_to_turn():
    with pytest.raises(ValueError, match='RMSProp has no hyper-parameter mom'):
        learner(optim.RMSProp).fit(1, cbs=OneCycle(moms=(0.95,0.85)))

def test_a_loader_that_gives_more_than_it_promised():
    class Liar(list):
        def __len__(self): return 2
    learn = learner()
    learn.dls.train = Liar(learn.dls.train)
    with pytest.raises(ValueError, match='batch 2 of a loader whose length is 2'): learn.fit(1, cbs=OneCycle())

@pytest.mark.parametrize('pos', [-0.1, 1.1, 7, math.nan])
def test_positions_are_shares(pos):
    with pytest.raises(ValueError, match='0 to 1'): OneCycle()(pos)

@pytest.mark.parametrize('factor', [lambda pos: -0.1, lambda pos: math.nan, lambda pos: math.inf, lambda pos: None, lambda pos: True],
                         ids=['negative', 'nan', 'inf', 'None', 'True'])
def test_a_factor_that_is_no_learning_rate_is_refused_before_a_step(factor):
    learn = learner()
    with pytest.raises(ValueError, match=r'Schedule: factor\(0\) is '): learn.fit(1, cbs=Schedule(factor))
    assert learn.step_count==0

def test_factors_of_numpy_and_torch_are_numbers():
    for kind in (np.float32, np.float64, torch.tensor):
        learn,sched = learner(),Schedule(lambda pos: kind(1-pos), lambda pos: kind(0.5))
        learn.fit(1, lr=1., cbs=sched)
        assert {type(o) for o in sched.lrs+sched.moms}=={float}

# ---- the sweep ----

@pytest.mark.parametrize('n_epochs', [1, 2])
def test_a_sweep_that_the_fit_cut_off_says_so(n_epochs):
    "An epoch of 8 batches is no sweep of 40; what exploded or came to its end is one"
    set_seed(0)
    learn,finder = learner(),LRFinder(1e-4, 1., 40)
    learn.fit(n_epochs, cbs=finder)
    with pytest.raises(ValueError, match=f'the fit was over after {8*n_epochs} batches of the 40'): finder.suggestion()
    with pytest.raises(ValueError, match='the fit was over'): finder.lowest()
    learn.fit(5, cbs=finder)
    assert len(finder.lrs)==40 and finder.suggestion()<=finder.lowest()

class Net(nn.Module):
    "Dropout, BatchNorm, and a buffer that is replaced and not saved"
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.register_buffer('calls', torch.zeros(()), persistent=False)
    def forward(self, x):
        self.calls = self.calls + 1
        return self.layers(x)

class Plain:
    "A model that is nothing but a list of tensors"
    def __init__(self): self.w = torch.randn(5, 2, requires_grad=True)
    def parameters(self): return [self.w]
    def __call__(self, x): return x@self.w

def torch_loaders():
    "PyTorch's loader with a generator of its own"
    ds = torch.utils.data.TensorDataset(*data().train_ds[:])
    dl = torch.utils.data.DataLoader(ds, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    return DataLoaders(dl, dl)

OPTS = {'ours': lambda p, lr: optim.SGD(p, lr, mom=0.9), 'our Adam': optim.Adam, 'our AdamW': optim.AdamW,
        'our RMSProp': optim.RMSProp, 'torch': lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 'torch AdamW': torch.optim.AdamW}

def flat(o):
    "All tensors and numbers in nested dicts and lists, in order"
    if isinstance(o, dict): return [v for k in o for v in flat(o[k])]
    if isinstance(o, (list,tuple)): return [v for e in o for v in flat(e)]
    return [o.clone() if isinstance(o, torch.Tensor) else o]

def run(model, opt_func, dls, between=None, first=True):
    "All that is left of two fits with `between` in between"
    set_seed(5)
    learn = Learner(model(), dls(), cross_entropy, 0.01, opt_func=opt_func)
    if first: learn.fit(1)
    if between: between(learn)
    learn.fit(2)
    tensors = [*learn.model.parameters(), *getattr(learn.model, 'buffers', list)()]
    modes = [m.training for m in learn.model.modules()] if isinstance(learn.model, nn.Module) else []
    return flat([[t.detach() for t in tensors], learn.opt.state_dict(), learn.history, learn.step_count, modes,
                 random.random(), float(np.random.rand()), torch.rand(3)])

def sweep_only(learn): learn.fit(50, cbs=LRFinder(1e-4, 10, 40))
def find(learn):
    try: lr_find(learn, n=40, plot=False)
    except ValueError as e: assert 'the loss never fell' in str(e)      # then, too, nothing may be changed
def interrupted(learn):
    cb = learn.add_cbs(Fails(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): lr_find(learn, n=40, plot=False)
    learn.remove_cbs(cb)
class NanLoss(Callback):
    def before_batch(self):
        if self.training and self.iter==6: self.learner.xb = self.xb*math.nan
def with_nan(learn):
    cb = learn.add_cbs(NanLoss())
    finder = LRFinder(1e-4, 10, 40)
    learn.fit(50, cbs=finder)
    assert len(finder.lrs)==6 and np.isfinite(finder.losses).all()
    learn.remove_cbs(cb)

def assert_same(a, b):
    assert len(a)==len(b)
    for x,y in zip(a, b): assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x==y

@pytest.mark.parametrize('between', [sweep_only, find, interrupted, with_nan])
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('dls', [data, lambda: data(seed=9), torch_loaders], ids=['unseeded','seeded','torch'])
def test_a_sweep_leaves_no_trace(dls, opt, between):
    assert_same(run(Net, OPTS[opt], dls), run(Net, OPTS[opt], dls, between))

@pytest.mark.parametrize('model', [Net, Plain])
@pytest.mark.parametrize('between', [sweep_only, find])
def test_nor_before_the_first_fit(model, between):
    assert_same(run(model, OPTS['ours'], data, first=False), run(model, OPTS['ours'], data, between, first=False))

def test_the_test_can_fail():
    class Forgetful(LRFinder):
        def cleanup_fit(self): pass
    a,b = run(Net, optim.SGD, data),run(Net, optim.SGD, data, lambda learn: learn.fit(50, cbs=Forgetful(n=40)))
    with pytest.raises(AssertionError): assert_same(a, b)

def test_workers_too():
    def dls():
        d = data(seed=4)
        d.train.n_workers = 2
        return d
    assert_same(run(Net, optim.SGD, dls), run(Net, optim.SGD, dls, find))

@pytest.mark.parametrize('curvature', [0.5, 2., 20.])
def test_it_sees_where_gradient_descent_diverges(curvature):
    "On w²·h/2 each step multiplies w by 1 - lr·h: it grows as soon as lr > 2/h"
    class W:
        def __init__(self): self.w = torch.ones(1, requires_grad=True)
        def parameters(self): return [self.w]
        def __call__(self, x): return self.w.expand(len(x))*math.sqrt(curvature/2)
    batch = [(torch.zeros(4), torch.zeros(4))]
    learn,finder = Learner(W(), DataLoaders(batch, batch), lambda p,t: mse(p,t)+0.01, 1.),LRFinder(1e-3, 100., 200)
    learn.fit(200, cbs=finder, valid=False)
    growing = [lr for lr,a,b in zip(finder.lrs, finder.losses, finder.losses[1:]) if b>1.01*a]
    assert growing and min(growing) > 2/curvature*0.999
    assert finder.lrs[-1] > 2/curvature > finder.suggestion()
    assert learn.model.w.item()==1.

def test_who_takes_part_in_a_sweep():
    class Watch(Callback):
        fits = 0
        def before_fit(self): self.fits += 1
    class Shy(Watch): in_lr_find = False
    watch,shy,sched = Watch(),Shy(),CosineAnneal()
    learn = learner(cbs=[watch, shy, sched])
    cbs = list(learn.cbs)
    lr_find(learn, n=40, plot=False)
    assert (watch.fits,shy.fits)==(1, 0) and not sched.lrs
    assert learn.cbs==cbs

def test_sweep_lrs_are_a_geometric_row():
    finder = LRFinder(1e-3, 0.1, 31)
    learner().fit(31, cbs=finder)
    near(finder.lrs, np.geomspace(1e-3, 0.1, 31), rel=1e-12, eps=0)

def test_an_optimizer_that_cannot_be_put_back():
    class Bare:
        def __init__(self, params, lr): self.params,self.lr = list(params),lr
        def step(self): pass
        def zero_grad(self): pass
    with pytest.raises(TypeError, match='Bare has no state_dict'): learner(Bare).fit(1, cbs=LRFinder())

def test_negative_losses_do_not_end_a_sweep_at_once():
    learn = Learner(nn.Linear(5, 2), data(), lambda p,t: cross_entropy(p,t)-10, 0.1)
    finder = LRFinder(1e-4, 1e-2, 40)
    learn.fit(40, cbs=finder)
    assert len(finder.lrs)==40

def test_a_fall_beyond_the_lowest_point_is_not_suggested():
    finder = LRFinder(n=100)
    finder.lrs = np.geomspace(1e-4, 10, 100).tolist()
    finder.losses = np.interp(np.arange(100), [0,40,60,70,99], [2,1,2,1.2,1.2]).tolist()     # the second fall is steeper
    assert finder.suggestion() < finder.lrs[40]

def test_the_lowest_point_is_the_minimum_of_a_known_curve():
    finder = LRFinder(n=100)
    finder.lrs = np.geomspace(1e-4, 10, 100).tolist()
    finder.losses = ((np.log10(finder.lrs)+1.5)**2 + 1).tolist()            # a parabola, lowest at 10^-1.5
    assert finder.suggestion() < finder.lowest() and abs(math.log10(finder.lowest())+1.5) < 0.06
    finder.losses = finder.losses[50:] + [5.]*50        # rises from the start: there is no place to name
    with pytest.raises(ValueError, match='never fell'): finder.lowest()
