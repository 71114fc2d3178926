"What the chapter only samples: any sizes, any place to fail or to cancel, both kinds of optimizer, memory of the process"
import copy, io, pickle, random
from functools import partial
from types import SimpleNamespace

import numpy as np

import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from course_lib.callbacks import GradClip, MetricsCB, SetupLearnerCB, TrackResults
from course_lib.conv import BatchNorm
from course_lib.dataloader import DataLoaders, Dataset
from course_lib.learner import (EVENTS, Callback, CancelBatchException, CancelEpochException, CancelFitException, Learner,
                                get_hyper, set_hyper)
from course_lib.module import Linear, Sequential
from course_lib.optim import SGD, Adam, AdamW
from course_lib.schedule import CosineAnneal, OneCycle

def batches(sizes): return [(torch.randn(n, 5), torch.randn(n, 1)) for n in sizes]

def make(train=(4,4,2), valid=(3,), cbs=None, model=None, **kwargs):
    torch.manual_seed(0)
    dls = SimpleNamespace(train=batches(train), valid=batches(valid))
    return Learner(model or nn.Linear(5, 1), dls, F.mse_loss, 0.1, cbs, **kwargs)

class Log(Callback):
    def __init__(self):
        self.log = []
        for e in EVENTS: setattr(self, e, partial(self.log.append, e))

class Raise(Callback):
    order = 1
    def __init__(self, event, exc, after=0):
        self.left = after
        def handler():
            self.left -= 1
            if self.left<0: raise exc
        setattr(self, event, handler)

def balanced(log):
    "Has each before_ its cleanup_, and are they nested?"
    stack = []
    for kind,_,stage in (e.partition('_') for e in log):
        if kind=='before': stack.append(stage)
        if kind=='cleanup' and stack.pop()!=stage: return False
    return not stack

main_events = [e for e in EVENTS if not e.startswith('cleanup')]

@given(st.sampled_from(main_events), st.integers(0, 8),
       st.sampled_from([CancelFitException, KeyError, KeyboardInterrupt, CancelEpochException, CancelBatchException]))
@settings(max_examples=80, deadline=None)
def test_cleanup_always_fires(event, after, exc):
    log = Log()
    learn = make(cbs=log)
    try: learn.fit(2, cbs=Raise(event, exc, after))
    except BaseException as e: assert type(e) is exc
    assert balanced(log.log) and log.log[-1]=='cleanup_fit'
    assert learn.cbs==[log] and not learn.training and learn.model.training and torch.is_grad_enabled()
    before = len(learn.history)
    learn.fit(1)
    assert len(learn.history)==before+2

@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.lists(st.integers(1, 7), min_size=1, max_size=4),
       st.integers(1, 3), st.sampled_from([SGD, Adam, torch.optim.SGD, torch.optim.AdamW]))
@settings(max_examples=40, deadline=None)
def test_equals_a_loop_by_hand(train, valid, n_epochs, opt_func):
    learn = make(train, valid, opt_func=opt_func)
    learn.fit(n_epochs)
    other = make(train, valid)
    model,losses = other.model,[]
    opt = opt_func(list(model.parameters()), 0.1)
    for _ in range(n_epochs):
        total = 0.
        for xb,yb in other.dls.train:
            loss = F.mse_loss(model(xb), yb)
            loss.backward(); opt.step(); opt.zero_grad()
            total += loss.item()*len(xb)        # Python's floats, of 64 bits
        losses.append(total/sum(train))
        with torch.no_grad(): losses.append(sum(F.mse_loss(model(xb), yb).item()*len(xb) for xb,yb in other.dls.valid)/sum(valid))
    for p,q in zip(learn.model.parameters(), model.parameters(), strict=True): assert torch.equal(p, q)
    assert [row['loss'] for row in learn.history]==pytest.approx(losses, rel=1e-6)      # sums of at most 5 numbers of 32 bits
    assert [row['n'] for row in learn.history]==[sum(train), sum(valid)]*n_epochs

def test_momentum_survives_from_fit_to_fit():
    mom = partial(SGD, mom=0.9)
    a,b = make(opt_func=mom),make(opt_func=mom)
    a.fit(4)
    b.fit(1); b.fit(3)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    assert a.step_count==b.step_count==12

def test_cancel_after_backward_adds_gradients_up():
    class Accumulate(Callback):
        def after_backward(self):
            if self.iter % 2==0: raise CancelBatchException
    learn = make((4,4), cbs=Accumulate())
    ref = make((4,4))
    sum(F.mse_loss(ref.model(xb), yb) for xb,yb in ref.dls.train).backward()
    SGD(ref.model.parameters(), 0.1).step()
    learn.fit(1, valid=False)
    for p,q in zip(learn.model.parameters(), ref.model.parameters()): torch.testing.assert_close(p, q)
    assert learn.step_count==1 and learn.history[0]['n']==4

def test_all_cleanups_run_and_the_first_error_stays():
    done = []
    class Bad(Callback):
        def cleanup_fit(self): raise KeyError('cleanup')
    class Good(Callback):
        order = 1
        def cleanup_fit(self): done.append(1)
    with pytest.raises(KeyError, match='cleanup'): make(cbs=[Bad(), Good()]).fit(1)
    with pytest.raises(RuntimeError, match='first') as e: make(cbs=[Bad(), Good(), Raise('after_loss', RuntimeError('first'))]).fit(1)
    assert 'Bad.cleanup_fit' in e.value.__notes__[0]
    with pytest.raises(KeyError): make(cbs=[Bad(), Good(), Raise('after_loss', CancelFitException)]).fit(1)
    assert done==[1,1,1]

@pytest.mark.parametrize('opt_func', [SGD, Adam, AdamW, torch.optim.SGD, torch.optim.Adam, partial(torch.optim.RMSprop, momentum=0.1)])
def test_hypers(opt_func):
    opt = opt_func([torch.zeros(2, requires_grad=True)], lr=0.1)
    set_hyper(opt, 'lr', 0.25), set_hyper(opt, 'mom', 0.5)
    assert (get_hyper(opt, 'lr'), get_hyper(opt, 'mom'))==(0.25, 0.5)
    with pytest.raises(ValueError, match='nonsense'): set_hyper(opt, 'nonsense', 1)

def two_groups(model, kind=torch.optim.SGD, **kwargs):
    "An opt_func that gives the first layer a hundredth of the learning rate"
    return lambda ps, lr: kind([{'params': model[0].parameters(), 'lr': lr/100}, {'params': model[1].parameters()}], lr=lr, **kwargs)

def net(): return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))

class Rates(Callback):
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append([g['lr'] for g in self.opt.param_groups])

@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_groups_keep_their_ratio(kind):
    model = net()
    learn = make(model=model, opt_func=two_groups(model, kind), cbs=[rates := Rates()])
    for lr in (None, 0.5, 0.01):
        learn.fit(1, lr=lr)
        for a,b in rates.seen: assert b==(lr or 0.1) and a==pytest.approx(b/100)
    for sched in (OneCycle(), CosineAnneal()):
        learn.fit(2, lr=0.2, cbs=sched)
        assert [b for a,b in rates.seen]==sched.lrs
        for a,b in rates.seen: assert a==pytest.approx(b/100)
    learn.fit(1, lr=0.3)
    assert rates.seen[-1]==pytest.approx([0.003, 0.3])
    copy = torch.optim.SGD([{'params': [nn.Parameter(torch.ones(1))], 'lr': 0.5}, {'params': [nn.Parameter(torch.ones(1))]}], lr=0.)
    set_hyper(copy, 'lr', 0.25)                         # made with 0: there is no ratio to keep
    assert [g['lr'] for g in copy.param_groups]==[0.25, 0.25]

def test_a_group_added_later_keeps_its_ratio_too():
    model = net()
    learn = make(model=model, opt_func=lambda ps, lr: torch.optim.SGD(model[1].parameters(), lr=lr))
    learn.fit(1)
    learn.opt.add_param_group({'params': model[0].parameters(), 'lr': 0.001})
    learn.fit(1, lr=1.)
    assert [g['lr'] for g in learn.opt.param_groups]==pytest.approx([1., 0.01])

def test_plain_models():
    class Flag:
        training = True
        def __init__(self): self.w,self.seen = torch.zeros(5, 1, requires_grad=True),[]
        def parameters(self): return [self.w]
        def __call__(self, xb):
            self.seen.append((self.training, torch.is_grad_enabled()))
            return xb@self.w
    learn = make((4,), (4,), model=Flag())
    learn.fit(1)
    with torch.no_grad(): learn.fit(1)          # training works inside no_grad too
    assert learn.model.seen==[(True,True), (False,False)]*2 and learn.model.training

def test_a_callback_may_serve_two_learners_in_turn():
    class Seen(Callback):
        def before_fit(self): self.model_seen = self.model
    cb = Seen()
    a,b = make(cbs=cb),make(cbs=cb)
    a.fit(1); assert cb.model_seen is a.model
    b.fit(1); assert cb.model_seen is b.model

def test_memory_is_flat():
    model = nn.Sequential(nn.Linear(5, 512), nn.ReLU(), nn.Linear(512, 1))
    sizes = []
    class Memory(Callback):
        def after_batch(self):
            if self.iter % 100==99: sizes.append(psutil.Process().memory_info().rss)
    x,y = torch.randn(64, 5),torch.randn(64, 1)
    loader = [(x, y)]*500
    Learner(model, SimpleNamespace(train=loader, valid=loader), F.mse_loss, 0.01, cbs=Memory()).fit(1)
    assert max(sizes[1:]) - sizes[0] < 40e6         # a graph kept for each batch would be 130 kB each, 130 MB in all

# ---- numbers, nests, frozen parts

@pytest.mark.parametrize('n', [np.int64(2), np.int8(2), torch.tensor(2), 2])
def test_numbers_are_numbers(n):
    learn = make()
    learn.fit(n, lr=np.float32(0.5))
    assert len(learn.history)==4 and learn.opt.lr==0.5 and type(learn.opt.lr) is float

@pytest.mark.parametrize('kwargs,says', [(dict(n_epochs=True), 'n_epochs is True'), (dict(n_epochs=2.), 'n_epochs is 2.0'), (dict(n_epochs='2'), "n_epochs is '2'"),
    (dict(lr=True), 'lr is True'), (dict(lr=float('nan')), 'lr is nan'), (dict(lr=-1.), 'lr is -1'), (dict(n_epochs=np.float64(1.)), 'n_epochs is')])
def test_what_is_no_number_is_refused(kwargs, says):
    learn = make()
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=says): learn.fit(**kwargs)
    for p,q in zip(learn.model.parameters(), before): assert torch.equal(p, q)
    assert learn.history==[] and learn.fits==[] and not learn.in_fit
    learn.fit(1)

class OfNest(nn.Module):
    "Takes and gives whatever the shape of the nest is"
    def __init__(self, pick, give):
        super().__init__()
        self.layer,self.pick,self.give = nn.Linear(5, 1),pick,give
    def forward(self, x): return self.give(self.layer(self.pick(x)))

NESTS = {'dict': (lambda x: {'v': x, 'w': torch.ones(len(x), 2)}, lambda d: d['v']), 'tuple': (lambda x: (x, torch.ones(len(x))), lambda t: t[0]),
         'list': (lambda x: [x], lambda t: t[0]), 'deep': (lambda x: {'a': [(x, 'text')]}, lambda d: d['a'][0][0])}

@pytest.mark.parametrize('inputs', NESTS)
@pytest.mark.parametrize('outputs', NESTS)
def test_nests_count_as_tensors_do(inputs, outputs):
    "Inputs, targets and predictions in tuples, lists and dicts give the history, the weights and the predictions of plain tensors"
    plain = make((4,4,2), (3,1))
    (wrap,pick),(give,take) = NESTS[inputs],NESTS[outputs]
    def wrapped(batches): return [(wrap(xb), wrap(yb)) for xb,yb in batches]
    torch.manual_seed(0)
    model = OfNest(pick, give)
    model.layer = nn.Linear(5, 1); model.layer.load_state_dict(plain.model.state_dict())
    dls = SimpleNamespace(train=wrapped(plain.dls.train), valid=wrapped(plain.dls.valid))
    learn = Learner(model, dls, lambda p,t: F.mse_loss(take(p), pick(t)), 0.1, cbs=[SetupLearnerCB('cpu'), MetricsCB(mae=lambda p,t: (take(p)-pick(t)).abs().mean())])
    plain.add_cbs(MetricsCB(mae=F.l1_loss))
    for o in (plain, learn): o.fit(2)
    assert learn.history==plain.history
    for a,b in zip(learn.model.parameters(), plain.model.parameters()): assert torch.equal(a, b)
    (preds,targs),(plain_preds,plain_targs) = learn.get_preds(),plain.get_preds()
    assert torch.equal(take(preds), plain_preds) and torch.equal(pick(targs), plain_targs)
    assert torch.equal(take(learn.predict(wrap(plain.dls.valid[0][0]))), plain.predict(plain.dls.valid[0][0]))

def test_predictions_in_a_nest_hold_no_graph_after_the_batch():
    class Look(Callback):
        def after_batch(self): assert not self.preds['a'].requires_grad and not self.loss.requires_grad
    model = OfNest(lambda x: x, lambda o: {'a': o})
    Learner(model, make().dls, lambda p,t: F.mse_loss(p['a'], t), 0.1, Look()).fit(1)

@pytest.mark.parametrize('batch,says', [(torch.ones(2,5), 'gave a Tensor'), ((1,2,3), 'tuple of 3'), ({'x': 1, 'y': 2}, 'gave a dict of 2'), (('a','b'), 'cannot be counted'),
                                        ((torch.tensor(1.), torch.tensor(2.)), 'cannot be counted')])
def test_what_is_no_batch_is_refused(batch, says):
    learn = make()
    learn.dls.train = [batch]
    with pytest.raises(TypeError, match=says): learn.fit(1)

def bn_net(): return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

@pytest.mark.parametrize('ours', [False, True])
def test_frozen_stays_frozen(ours):
    model = Sequential(Linear(5, 4), BatchNorm(4), Linear(4, 1)) if ours else bn_net()
    model[1].eval()
    for p in model[0].parameters(): p.requires_grad_(False)
    before = {k: v.clone() for k,v in model.state_dict().items()}
    class Modes(Callback):
        seen = set()
        def after_pred(self): self.seen.add((self.training, *(m.training for m in self.model.modules())))
    learn = make(model=model, cbs=(modes := Modes()))
    learn.fit(2); learn.fit(1); learn.get_preds()
    for k,v in model.state_dict().items():
        frozen = k.startswith('0') or k.startswith('1.running') or k.startswith('1.num')
        assert torch.equal(v, before[k])==frozen, k
    assert [m.training for m in model.modules()]==[m is not model[1] for m in model.modules()]
    assert {o[0] for o in modes.seen if any(o[1:])}=={True}        # nothing is in training mode in validation

def test_a_model_that_was_used_is_trained():
    "In eval mode as a whole it was not frozen but asked for predictions"
    model = bn_net().eval()
    make(model=model).fit(1, valid=False)
    assert model[1].num_batches_tracked==3 and not model.training and not model[1].training

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sums_are_wide(dtype):
    "4,000 equal losses of two bytes have themselves as their mean; summed in two bytes they would not"
    class Half(nn.Linear):
        def forward(self, x): return super().forward(x).mean(1)
    dls = SimpleNamespace(train=None, valid=[(torch.ones(1,5), torch.zeros(1))]*4000)
    learn = Learner(nn.Linear(5,1), dls, lambda p,t: (p.sum()*0 + 0.7).to(dtype), 0.1, MetricsCB(m=lambda p,t: torch.tensor(0.7, dtype=dtype)))
    learn.fit(1, train=False)
    true = torch.tensor(0.7, dtype=dtype).item()
    assert learn.history[0]['loss']==pytest.approx(true, rel=1e-5) and learn.history[0]['m']==pytest.approx(true, rel=1e-5)

def test_a_fit_within_a_fit_is_refused():
    class Nested(Callback):
        def after_batch(self): self.learner.fit(1)
    learn = make()
    with pytest.raises(RuntimeError, match='under way already'): learn.fit(1, cbs=Nested())
    learn.fit(1)

def test_left_over_gradients_do_not_enter_the_next_fit():
    class CancelOne(Callback):
        def after_backward(self):
            if self.step_count==2: raise CancelFitException
    a,b = make(),make()
    a.fit(1, cbs=CancelOne())
    assert a.model.weight.grad is not None
    b.model.load_state_dict(a.model.state_dict())
    a.fit(1); b.fit(1)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)

# ---- events and names

def a_class(**members): return type('Some', (Callback,), members)

@pytest.mark.parametrize('name', ['befor_fit', 'before_epok', 'after_bacth', 'cleanup_batches', 'before_training', 'afterbatch', 'after_epochs'])
def test_misspelt_events_are_refused(name):
    with pytest.raises(TypeError, match=f'Some.{name}: there is no such event'): a_class(**{name: lambda self: None})

@pytest.mark.parametrize('name', ['per_epoch', 'loss_after_step', 'aftermath', 'fit_one', 'step', 'batch_before', '_after_batch', 'on_train_begin', 'epoch_after'])
def test_innocent_names_are_not(name): a_class(**{name: lambda self: None})()

def test_a_mixin_is_looked_at_too():
    mixin = type('Mixin', (), {'after_bacth': lambda self: None})
    with pytest.raises(TypeError, match='Some.after_bacth: there is no such event'): type('Some', (mixin, Callback), {})
    class Base(Callback):
        def after_batch(self): pass
    type('Derived', (type('Good', (), {'after_loss': lambda self: None}), Base), {})

def test_what_a_call_would_not_run_is_refused():
    async def later(self): pass
    def piecewise(self): yield
    for f in later, piecewise:
        with pytest.raises(TypeError, match='would not run it'): a_class(after_batch=f)

def test_a_class_for_a_model_and_a_fit_of_nothing_are_refused():
    with pytest.raises(TypeError, match='Linear is a class'): Learner(nn.Linear, None, F.mse_loss, 0.1)
    learn = make()
    with pytest.raises(ValueError, match='nothing to do'): learn.fit(1, train=False, valid=False)
    learn.fit(1)

def test_an_error_inside_a_property_is_its_own():
    class P(Callback):
        @property
        def thing(self): return self.learner.nothing_here
    learn = make(cbs=(p := P()))
    with pytest.raises(AttributeError, match="'Learner' object has no attribute 'nothing_here'"): p.thing
    with pytest.raises(AttributeError, match='P has no other, and neither has its Learner'): p.other

# ---- what is drawn

def test_plot_losses_draws_what_history_says():
    learn = make()
    learn.fit(3)
    ax = learn.plot_losses()
    train,valid = ax.get_lines()
    for line,kind in ((train, True), (valid, False)):
        assert list(line.get_xdata())==[1, 2, 3]
        assert list(line.get_ydata())==[row['loss'] for row in learn.history if row['train']==kind]
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['training', 'validation'] and ax.get_xlabel()=='epochs trained'

# ---- the state of a learner

class Noise(Callback):
    "Draws from all three generators"
    def before_batch(self): self.learner.xb = self.xb + torch.randn_like(self.xb)*0.1 + random.random()*0.1 + np.random.rand()*0.1

def rich(seed, loaders='ours', cbs=(), opt_func=partial(SGD, mom=0.9)):
    "A learner with all kinds of things that a fit changes"
    x = torch.linspace(-1, 1, 26*5).view(26, 5)
    ds = Dataset(x, x.sum(1, keepdim=True)**2)
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    if loaders=='torch':
        g = torch.Generator().manual_seed(seed)
        dls = SimpleNamespace(train=torch.utils.data.DataLoader(ds, 4, shuffle=True, generator=g), valid=torch.utils.data.DataLoader(ds, 8))
    else: dls = DataLoaders.from_datasets(ds, ds, bs=4, seed=3 if loaders=='seeded' else None)
    return Learner(bn_net(), dls, F.mse_loss, 0.05, [Noise(), TrackResults(F.l1_loss), GradClip(1.), *cbs], opt_func)

class StateAt(Callback):
    "Takes the state after some batches, and fails if it is told to"
    order,count = 500,0
    def __init__(self, n, event='after_batch', fail=True):
        def handler():
            self.count += 1
            if self.count!=n: return
            self.state = self.learner.state_dict()
            if fail: raise RuntimeError('stop')
        setattr(self, event, handler)

def end(learn):
    return [p.detach() for p in learn.model.parameters()], [b for b in learn.model.buffers()], learn.opt.state_dict(), learn.history, learn.step_count, \
           [t for cb in learn.cbs if isinstance(cb, GradClip) for t in cb.norms], random.random(), np.random.rand(3).tolist(), torch.rand(3), \
           [getattr(dl, 'epoch', None) for dl in (learn.dls.train, learn.dls.valid)]

def same(a, b, where='end'):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor): assert a.dtype==b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys()==b.keys(), where
        for k in a: same(a[k], b[k], f'{where}/{k}')
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b), where
        for i,(v,w) in enumerate(zip(a, b)): same(v, w, f'{where}/{i}')
    else: assert a==b, where

OPT_FUNCS = {'SGD': partial(SGD, mom=0.9), 'AdamW': AdamW, 'torch SGD': partial(torch.optim.SGD, momentum=0.9), 'torch AdamW': torch.optim.AdamW}

@pytest.mark.parametrize('event,n', [('after_batch', 1), ('after_batch', 7), ('after_batch', 9), ('after_batch', 12), ('after_batch', 15), ('after_epoch', 1), ('after_epoch', 2), ('before_epoch', 3)])
@pytest.mark.parametrize('loaders', ['ours', 'seeded', 'torch'])
@pytest.mark.parametrize('opt', ['AdamW', 'torch SGD'])
def test_a_fit_goes_on_from_any_state(opt, loaders, event, n):
    "Training and validation passes of 7 and 4 batches: stopped after any batch or pass, and loaded into another learner"
    opt_func = OPT_FUNCS[opt]
    plain = rich(0, loaders, opt_func=opt_func); plain.fit(2); plain = end(plain)
    at = StateAt(n, event)
    with pytest.raises(RuntimeError, match='stop'): rich(0, loaders, [at], opt_func).fit(2)
    for _ in range(2):      # a state can be used more than once
        learn = rich(5, loaders, opt_func=opt_func)
        learn.load_state_dict(at.state)
        learn.fit(2)
        same(end(learn), plain)

def test_taking_a_state_changes_nothing():
    plain = rich(0); plain.fit(2)
    class Takes(Callback):
        def after_batch(self): self.learner.state_dict()
    watched = rich(0, cbs=[Takes()]); watched.fit(2)
    for p,q in zip(plain.model.parameters(), watched.model.parameters()): assert torch.equal(p, q)
    assert plain.history==watched.history

def test_a_state_is_a_copy_and_survives_a_file():
    learn = rich(0); learn.fit(1)
    state = learn.state_dict()
    file = io.BytesIO(); torch.save(state, file); file.seek(0)
    same(torch.load(file, weights_only=True), state)
    learn.fit(1)
    same(torch.load(io.BytesIO(file.getvalue()), weights_only=True), state)     # the fit has not changed it
    learn.load_state_dict(state)
    same(learn.state_dict(), state)

def test_waiting_gradients_are_part_of_it():
    learn = make(); learn.fit(1)
    learn.model.weight.grad = torch.ones(1, 5)
    other = make(); other.load_state_dict(learn.state_dict())
    assert torch.equal(other.model.weight.grad, torch.ones(1, 5)) and other.model.bias.grad is None

def test_before_the_first_fit():
    a,b = make(),make()
    with torch.no_grad(): b.model.weight.zero_()
    b.fit(1)
    b.load_state_dict(a.state_dict())
    assert b.opt is None and b.history==[] and b.fits==[] and torch.equal(a.model.weight, b.model.weight)

def unfit(change):
    state = rich(0)
    state.fit(1)
    state = state.state_dict()
    change(state)
    return state

class Remembers(Callback):
    def state_dict(self): return {'x': 1}
    def load_state_dict(self, state): raise KeyError('broken')

@pytest.mark.parametrize('change,says', [
    (lambda s: s.pop('model'), 'model is missing'), (lambda s: s.update(extra=1), 'extra is unknown'), (lambda s: s['model'].pop('0.bias'), '0.bias is missing'),
    (lambda s: s['model'].update({'0.weight': torch.ones(2, 2)}), r'0.weight was \(2, 2\)'), (lambda s: s['model'].update({'0.bias': s['model']['0.bias'].double()}), 'float64'),
    (lambda s: s['opt'].update({'class': 'Adam'}), 'class was Adam'), (lambda s: s['opt']['shapes'].pop(), 'shapes was'), (lambda s: s['opt']['state'].pop('state'), 'state'),
    (lambda s: s['callbacks'].pop('GradClip'), 'GradClip is missing'), (lambda s: s['callbacks'].update({'Other': {}}), 'Other is unknown'),
    (lambda s: s['random'].update(torch=torch.zeros(3, dtype=torch.uint8)), ''), (lambda s: s['random'].pop('numpy'), 'numpy'), (lambda s: s.update(history=[1]), ''),
    (lambda s: s.update(history='no'), ''), (lambda s: s.update(step_count=-1), 'step_count is -1'), (lambda s: s.update(step_count='7'), "step_count is '7'"),
    (lambda s: s.update(fits=True), ''), (lambda s: s['fits'][0].pop('lr'), 'lr is missing'), (lambda s: s.update(position={'pass_no': 1}), 'position'), (lambda s: s['loaders'].pop(), 'loaders'),
    (lambda s: s.update(loaders=5), ''), (lambda s: s.update(grads={0: torch.ones(3)}), ''), (lambda s: s.update(callbacks=None), ''), (lambda s: s['model'].update({'0.bias': 'text'}), '')])
def test_what_does_not_fit_changes_nothing(change, says):
    state = unfit(change)
    learn = rich(1); learn.fit(1)
    learn.model[0].weight.grad = torch.ones(4, 5)
    before = learn.state_dict()
    with pytest.raises(ValueError, match=f'nothing was changed.*{says}'): learn.load_state_dict(state)
    same(learn.state_dict(), before)

@pytest.mark.parametrize('junk', [None, 5, [], 'state', {}, {'model': None}])
def test_junk_is_refused(junk):
    learn = make(); learn.fit(1)
    before = learn.state_dict()
    with pytest.raises(ValueError, match='nothing was changed'): learn.load_state_dict(junk)
    same(learn.state_dict(), before)

def test_a_callback_that_fails_to_load_undoes_all():
    a = make(cbs=Remembers()); a.fit(1)
    b = make(cbs=type('Remembers', (Callback,), {'state_dict': lambda self: {'x': 1}, 'load_state_dict': lambda self, s: setattr(self, 'n', getattr(self, 'n', 0)+1) or (1/0 if self.n==1 else None)})())
    before = b.state_dict()
    with pytest.raises(ValueError, match='division'): b.load_state_dict(a.state_dict())
    same(b.state_dict(), before)

def test_what_cannot_be_saved_is_refused_by_its_path():
    class Odd(Callback):
        def state_dict(self): return {'seen': {'a': {1, 2}}}
        def load_state_dict(self, state): pass
    with pytest.raises(TypeError, match='state/callbacks/Odd/seen/a is a set'): make(cbs=Odd()).state_dict()
    class Numpy(Callback):
        def state_dict(self): return {'n': np.int64(3), 'x': np.float32(0.5), 'b': np.bool_(True), ('a', 1): None}
        def load_state_dict(self, state): self.got = state
    a,b = make(cbs=Numpy()),make(cbs=Numpy())
    b.load_state_dict(a.state_dict())
    assert b.cbs[0].got=={'n': 3, 'x': 0.5, 'b': True, ('a', 1): None} and [type(v) for v in b.cbs[0].got.values()]==[int, float, bool, type(None)]

def test_a_state_is_had_between_batches_only():
    with pytest.raises(RuntimeError, match='a batch is under way'): make(cbs=StateAt(1, 'after_step')).fit(1)
    class Load(Callback):
        def after_batch(self): self.learner.load_state_dict(self.learner.state_dict())
    with pytest.raises(RuntimeError, match='a pass is under way'): make(cbs=Load()).fit(1)

@pytest.mark.parametrize('kwargs,says', [(dict(lr=0.3), 'lr was 0.05 and is 0.3'), (dict(valid=False), 'passes was')])
def test_another_fit_does_not_go_on(kwargs, says):
    at = StateAt(3)
    with pytest.raises(RuntimeError): rich(0, cbs=[at]).fit(2)
    learn = rich(1); learn.load_state_dict(at.state)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=says): learn.fit(2, **kwargs)
    for p,q in zip(learn.model.parameters(), before): assert torch.equal(p, q)
    learn.fit(2)        # the right one still does
    plain = rich(0); plain.fit(2)
    assert learn.history==plain.history

def test_a_loader_with_fewer_batches_is_refused():
    at = StateAt(5)
    with pytest.raises(RuntimeError): rich(0, 'torch', [at]).fit(1)
    learn = rich(0, 'torch')
    learn.dls.train = torch.utils.data.DataLoader(list(learn.dls.train.dataset)[:24], 4, shuffle=True, generator=learn.dls.train.generator)
    with pytest.raises(ValueError, match='items was 26 and is 24|batches was 7 and is 6'): learn.load_state_dict(at.state)

def test_learners_can_be_copied_and_pickled():
    learn = rich(0, cbs=[OneCycle(moms=(0.95, 0.85))])
    learn.fit(1)
    ends = []
    for other in (learn, copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        ends.append(copy.deepcopy(other))
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        ends[-1].fit(1)
    for other in ends[1:]: same(end(other)[:2], end(ends[0])[:2])

# ---- callbacks that come or go in the middle of a fit

def test_a_callback_that_comes_in_the_middle_of_a_fit_is_called():
    class Bring(Callback):
        def __init__(self, event, log):
            self.log = log
            def handler():
                if self.log not in self.learner.cbs: self.learner.add_cbs(self.log)
            setattr(self, event, handler)
    for event in 'before_fit', 'before_epoch', 'after_batch', 'after_epoch':
        log = Log()
        make(cbs=Bring(event, log)).fit(2)
        assert 'after_batch' in log.log and log.log[-2:]==['after_fit', 'cleanup_fit'], event

def test_a_callback_that_goes_in_the_middle_of_a_fit_hears_no_more():
    class Leave(Log):
        def __init__(self, event):
            super().__init__()
            setattr(self, event, partial(self.leave, event))
        def leave(self, event):
            self.log.append(event)
            self.learner.remove_cbs(self)
    for event in 'before_fit', 'before_epoch', 'after_batch', 'after_epoch':
        learn = make(cbs=[leave := Leave(event), other := Log()])
        learn.fit(2)
        assert leave.log[-1]==event and leave.log.count(event)==1 and learn.cbs==[other] and leave.learner is None
        assert balanced(other.log)

def test_a_callback_that_comes_or_goes_while_predicting():
    class InPredict(Callback):
        asked = False
        def after_epoch(self):
            if self.asked or not self.training: return
            self.asked = True
            self.learner.add_cbs(came := Log())
            self.learner.get_preds()
            assert set(came.log)=={'before_batch', 'after_pred', 'cleanup_batch'}
        def after_pred(self):
            if self.asked and late not in self.learner.cbs: self.learner.add_cbs(late)
    late = Log()
    make(cbs=InPredict()).fit(1)
    assert set(late.log[:1])=={'cleanup_batch'} and late.log.count('before_epoch')==1 and late.log[-1]=='cleanup_fit'

@pytest.mark.parametrize('opt_func,other,says', [
    (partial(AdamW, wd=0.01), partial(AdamW, wd=0.5), 'wd was 0.01 and is 0.5 here'),
    (partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.5), 'momentum was 0.9 and is 0.5 here')])
def test_a_fit_does_not_go_on_with_another_optimizer_setting(opt_func, other, says):
    "It would use the numbers of the state without a word; what a schedule has changed meanwhile is no other setting"
    class Schedule(Callback):
        def after_step(self):
            for g in getattr(self.opt, 'param_groups', [vars(self.opt)]):
                for name in {'wd', 'weight_decay'} & set(g): g[name] = 0.02*self.step_count
    def make_it(opt_func, *cbs):
        learn = make(cbs=[Schedule(), *cbs])
        learn.opt_func = opt_func
        return learn
    with pytest.raises(RuntimeError): make_it(opt_func, at := StateAt(3)).fit(2)
    learn = make_it(other)
    learn.load_state_dict(at.state)
    with pytest.raises(ValueError, match=says): learn.fit(2)
    right,plain = make_it(opt_func),make_it(opt_func)
    right.load_state_dict(at.state)
    right.fit(2)
    plain.fit(2)
    assert right.step_count==plain.step_count
