"What a notebook cannot show of the callbacks: a terminal, a clean import, laws that hold for any numbers"
import subprocess, sys

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from course_lib.callbacks import (EarlyStopping, EventTrace, GradAccumulation, GradClip, MetricsCB, ProgressCB, SetupLearnerCB,
                                  TrackResults)
from course_lib.core import set_seed
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.learner import EVENTS, Callback, CancelEpochException, CancelFitException, Learner
from course_lib.losses import accuracy

def make_learner(cbs, n=50, bs=16):
    set_seed(0)
    ds = Dataset(torch.randn(n, 4), torch.randint(3, (n,)))
    return Learner(nn.Linear(4, 3), DataLoaders(DataLoader(ds, bs), DataLoader(ds, bs)), F.cross_entropy, 0.1, cbs)

def test_light_import():
    "The module pulls in nothing heavy"
    code = ("import sys, course_lib.callbacks; "
            "print([o for o in ('tensorboard', 'matplotlib', 'pandas', 'fastai', 'IPython', 'sklearn') if o in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_plain_lines(capfd):
    "Without a terminal there are plain lines, and nothing on stderr"
    make_learner([TrackResults(), ProgressCB()]).fit(2)
    out,err = capfd.readouterr()
    assert err=='' and '\r' not in out
    assert [o.split()[:1] for o in out.splitlines()] == [['epoch'], ['0'], ['1']]

@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 70), bs=st.integers(1, 80))
def test_sample_weighted(n, bs):
    "Loss and accuracy of a validation pass are those of all predictions at once, whatever the batch size"
    track = TrackResults()
    learn = make_learner(track, n, bs)
    learn.fit(1, train=False)
    preds,targs = learn.get_preds()
    assert track.results()[0] == pytest.approx(accuracy(preds, targs).item(), abs=1e-5)
    assert track.results('loss')[0] == pytest.approx(F.cross_entropy(preds, targs).item(), abs=1e-5)

def test_predict_before_any_fit():
    "The input transform applies without a fit, and where there are no targets"
    learn = make_learner(SetupLearnerCB('cpu', lambda xb: xb*2))
    xb = torch.randn(5, 4)
    torch.testing.assert_close(learn.predict(xb), learn.model(xb*2).detach())

@settings(deadline=None, max_examples=30)
@given(scale=st.floats(1e-3, 1e3), limit=st.floats(1e-2, 10))
def test_clip_equals_torch(scale, limit):
    "Clipping is torch's, for gradients far below and far above the limit"
    a,b = make_learner(GradClip(limit)),make_learner(None)
    for learn in (a, b):
        for i,p in enumerate(learn.model.parameters()): p.grad = torch.full_like(p, scale*(i+1))
    a.cbs[0].before_fit(); a.cbs[0].after_backward()
    norm = nn.utils.clip_grad_norm_(b.model.parameters(), limit)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p.grad, q.grad)
    assert torch.equal(a.cbs[0].norms[0], norm)

class RaiseFirst(Callback):
    "Raises `exc` at `event`, before any other callback has its turn"
    order = -1000
    def __init__(self, event, exc):
        def handler(): raise exc
        setattr(self, event, handler)

MAKE = {'progress': lambda: ProgressCB(plain=True), 'accumulation': lambda: GradAccumulation(2), 'stop': lambda: EarlyStopping(restore=True),
        'metrics': lambda: MetricsCB(right=accuracy), 'track': TrackResults, 'clip': lambda: GradClip(1.), 'setup': lambda: SetupLearnerCB('cpu'),
        'trace': EventTrace}

@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('event', [o for o in EVENTS if not o.startswith('cleanup')])
@pytest.mark.parametrize('exc', [CancelFitException, CancelEpochException])
def test_another_callback_may_cancel_first(name, event, exc):
    "Cleanup fires also where this callback has not begun; and the next fit is as ever"
    if exc is CancelEpochException and event in ('before_fit', 'after_fit'): return
    learn = make_learner([MAKE[name](), raises := RaiseFirst(event, exc)])
    learn.fit(1)
    learn.remove_cbs(raises)
    n = len(learn.history)
    learn.fit(1)
    assert len(learn.history)==n+2

def test_early_stopping_gives_back_only_weights_of_its_fit():
    stop = EarlyStopping(restore=True)
    learn = make_learner(stop)
    learn.fit(2)
    learn.remove_cbs(stop)
    learn.fit(2)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, cbs=[stop, RaiseFirst('before_fit', CancelFitException)])
    for p,q in zip(learn.model.parameters(), before): assert torch.equal(p, q)

def test_trace_names_all_who_listen_and_is_silent_in_predictions(capsys):
    class Quiet(Callback):
        def __init__(self): self.after_loss = lambda: None       # a handler of this one object
    learn = make_learner([EventTrace(), Quiet()])
    learn.get_preds()
    assert capsys.readouterr().out==''
    learn.fit(1)
    assert [o.strip() for o in capsys.readouterr().out.splitlines() if '->' in o]==2*['after_loss  loss ()  -> Quiet']

@pytest.mark.parametrize('by_hand', [False, True])
def test_a_second_accumulation_is_refused_and_leaves_the_first_alone(by_hand):
    "Two would weigh the gradients twice, without a word"
    learn = make_learner([] if by_hand else GradAccumulation(2))
    if by_hand: learn.n_accum = 2
    with pytest.raises(ValueError, match='waits for 2 batches already'): learn.fit(1, cbs=GradAccumulation(4))
    assert learn.n_accum==(2 if by_hand else 1) and 'backward' not in vars(learn)
    learn.fit(1)
    assert learn.step_count==2      # of 4 batches

def test_early_stopping_must_be_told_which_way_is_better():
    assert EarlyStopping().mode=='min' and EarlyStopping(monitor='accuracy', mode='max').mode=='max'
    for kwargs in (dict(monitor='accuracy'), dict(monitor='accuracy', mode=None), dict(mode='lower')):
        with pytest.raises(ValueError, match="'min' if lower is better, 'max' if higher"): EarlyStopping(**kwargs)
    for min_delta in (-1., float('nan'), '0.1'):
        with pytest.raises(ValueError, match='min_delta is'): EarlyStopping(min_delta=min_delta)

def test_progress_shows_numbers_of_any_make(capsys):
    class Adds(Callback):
        def after_epoch(self): self.history[-1].update(a=np.float32(1.5), b=torch.tensor(2.5), c=np.array(3.5), d='text', e=torch.ones(2))
    make_learner([Adds(), ProgressCB(plain=True)]).fit(1, valid=False)
    names,row = capsys.readouterr().out.splitlines()
    assert names.split()==['epoch', *'train loss train a train b train c'.split()] and row.split()[2:]==['1.5000', '2.5000', '3.5000']
