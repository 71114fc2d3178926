"What the chapter only samples: any sizes, any place to fail or to cancel, both kinds of optimizer, memory of the process"
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from course_lib.learner import (EVENTS, Callback, CancelBatchException, CancelEpochException, CancelFitException, Learner,
                                get_hyper, set_hyper)
from course_lib.optim import SGD, Adam, AdamW

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
            total = total + loss.detach()*len(xb)
        losses.append(total.item()/sum(train))
        with torch.no_grad(): total = sum(F.mse_loss(model(xb), yb)*len(xb) for xb,yb in other.dls.valid)
        losses.append(float(total)/sum(valid))
    for p,q in zip(learn.model.parameters(), model.parameters(), strict=True): assert torch.equal(p, q)
    assert [row['loss'] for row in learn.history]==losses
    assert [row['n'] for row in learn.history]==[sum(train), sum(valid)]*n_epochs

def test_momentum_survives_from_fit_to_fit():
    mom = partial(SGD, mom=0.9)
    a,b = make(opt_func=mom),make(opt_func=mom)
    a.fit(4)
    b.fit(1); b.fit(3)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    assert a.step_count==b.step_count==12

def test_start_epoch_is_set_anew():
    class From(Callback):
        def before_fit(self): self.learner.start_epoch = 2
    learn = make()
    learn.fit(3, valid=False, cbs=From())
    learn.fit(1, valid=False)
    assert [row['epoch'] for row in learn.history]==[2, 0]

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

def test_hypers_reach_all_groups():
    p,q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    opt = torch.optim.AdamW([{'params': [p], 'lr': 1.}, {'params': [q]}], lr=0.1)
    set_hyper(opt, 'lr', 0.5), set_hyper(opt, 'mom', 0.6)
    assert [(g['lr'], g['betas']) for g in opt.param_groups]==[(0.5, (0.6, 0.999))]*2

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
