"The speedrun's parts: pixels as they should be, orthogonalized steps against decompositions, and a recipe that learns"
import re

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from course_lib.callbacks import GradAccumulation, GradClip, SetupLearnerCB
from course_lib.core import set_seed
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.learner import Callback, CancelBatchException, CancelFitException, Learner
from course_lib.losses import cross_entropy
from course_lib.module import Flatten, Linear, ReLU, Sequential
from course_lib.optim import SGD
from course_lib.schedule import lr_find
from course_lib.speedrun import (PIXEL_MEAN, PIXEL_STD, MixedPrecisionCB, Muon, PixelsCB, bfloat16_is_fast, orthogonalize,
                                 speed_learner, speed_net)

class KeepBatch(Callback):
    def after_pred(self): self.seen = self.xb

def seen(x, train, size, **kwargs):
    "What a network gets of `x`"
    dl = DataLoader(Dataset(x, torch.zeros(len(x), dtype=torch.int64)), len(x))
    cbs = [keep := KeepBatch(), PixelsCB(size, **kwargs)]
    Learner(Sequential(Flatten(), Linear(size*size, 2)), DataLoaders(dl, dl), cross_entropy, 0., cbs).fit(
        1, train=train, valid=not train)
    return keep.seen

def prepared(x): return ((x.double()-PIXEL_MEAN)/PIXEL_STD)[:,None]

@given(h=st.integers(4, 12), w=st.integers(4, 12), size=st.integers(1, 4), last=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pixels_are_the_middle_of_the_image(h, w, size, last, seed):
    x = torch.randint(256, (3,h,w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    got = seen(x, False, size, channels_last=last)
    top,left = (h-size)//2,(w-size)//2
    torch.testing.assert_close(got.double(), prepared(x[:, top:top+size, left:left+size]), rtol=1e-4, atol=1e-4)
    assert got.stride(1)==(1 if last else size*size)
    assert torch.equal(x, before)       # the dataset is as it was

def test_pixels_move_in_training_only_and_to_all_places():
    x = torch.arange(100, dtype=torch.uint8).reshape(1,10,10)
    places = {(r,c): prepared(x[:, r:r+6, c:c+6]).float() for r in (1,2,3) for c in (1,2,3)}
    set_seed(0)
    found = set()
    for _ in range(60):
        got = seen(x, True, 6, shift=1)
        found |= {k for k,v in places.items() if torch.allclose(got, v, atol=1e-4)}
    assert found==set(places)
    for _ in range(5): torch.testing.assert_close(seen(x, False, 6, shift=1), places[2,2], rtol=1e-4, atol=1e-4)

def test_pixels_refuse_what_they_cannot_use():
    x = torch.zeros(2,8,8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape('(2, 8, 8) float32, but uint8 (bs, h, w) is wanted')): seen(x.float(), False, 8)
    with pytest.raises(ValueError, match=re.escape('(2, 1, 8, 8) uint8')): seen(x[:,None], False, 8)
    with pytest.raises(ValueError, match=re.escape('no room for a middle of 9')): seen(x, False, 9)
    with pytest.raises(ValueError, match=re.escape('moves by 1')): seen(x, True, 7, shift=1)

def test_pixels_take_numpys_numbers_and_nothing_else_than_counts():
    x = torch.randint(256, (3,8,8), dtype=torch.uint8)
    assert torch.equal(seen(x, False, np.int64(6), shift=np.int32(1)), seen(x, False, 6, shift=1))
    for kwargs,why in [(dict(size=0), 'size is 0'), (dict(size=6.5), 'size is 6.5'), (dict(shift=-1), 'shift is -1'),
                       (dict(size=True), 'size is True')]:
        with pytest.raises(ValueError, match=f'PixelsCB: {why}, but a whole number'): PixelsCB(**kwargs)

@pytest.mark.parametrize('first', [True, False], ids=['pixels first', 'device first'])
def test_pixels_stay_where_the_batch_was_moved(first):
    "With a device that is not the CPU ('meta' has no numbers, but is a device of its own), in either order"
    class Stop(Callback):
        def after_pred(self):
            self.device = self.preds.device.type
            raise CancelFitException
    dl = DataLoader(Dataset(torch.zeros(4,28,28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)), 4)
    cbs = [PixelsCB(22, shift=1), SetupLearnerCB('meta'), stop := Stop()]
    model = nn.Sequential(nn.Flatten(), nn.Linear(22*22, 10))       # PyTorch's, since ours do not move to 'meta'
    Learner(model, DataLoaders(dl, dl), cross_entropy, 0.1, cbs if first else cbs[::-1], Muon).fit(1, valid=False)
    assert stop.device=='meta'

@given(shape=st.sampled_from([(1,1), (1,9), (9,1), (5,5), (8,40), (40,8), (6,3,2,2), (24,16,3,3)]),
       scale=st.sampled_from([1e-4, 1., 1e4]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_orthogonalize_keeps_directions_and_evens_out_sizes(shape, scale, seed):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    out = orthogonalize(g, 5)
    assert out.shape==g.shape
    m = g.flatten(1)
    rows,columns = m.shape
    u,s,vt = torch.linalg.svd(m.double(), full_matrices=False)
    want = s/(s.norm()+1e-7)
    for _ in range(5): want = 3.4445*want - 4.7750*want**3 + 2.0315*want**5
    want = u@want.diag()@vt * max(1, rows/columns)**0.5
    torch.testing.assert_close(out.flatten(1).double(), want, rtol=1e-2, atol=1e-2)

def test_orthogonalize_leaves_the_gradient_alone_and_wants_a_matrix():
    g = torch.randn(4,3)
    before = g.clone()
    orthogonalize(g)
    assert torch.equal(g, before)
    assert torch.equal(orthogonalize(torch.zeros(4,3)), torch.zeros(4,3))       # nothing to move, and no nan
    with pytest.raises(ValueError, match=re.escape('(3,) is no matrix')): orthogonalize(torch.ones(3))
    for n in (-1, 2.5):
        with pytest.raises(ValueError, match=f'orthogonalize: n_rounds is {n}'): orthogonalize(g, n)
    assert torch.equal(orthogonalize(g, np.int64(2)), orthogonalize(g, 2))

@pytest.mark.parametrize('shape', [(12,30), (30,12), (7,7)])
def test_muon_is_pytorchs_on_matrices(shape):
    set_seed(0)
    p = torch.randn(shape, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    ours,theirs = Muon([p], lr=0.1), torch.optim.Muon([q], lr=0.1, weight_decay=0., momentum=0.6, ns_steps=3)
    for _ in range(5):
        for t,opt in ((p, ours), (q, theirs)):
            t.grad = (t.detach()-1).sin()
            opt.step()
    torch.testing.assert_close(p, q, rtol=0, atol=3e-2)        # theirs multiplies in bfloat16

def test_muon_is_nesterov_on_the_rest():
    p = torch.randn(9, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    ours,theirs = Muon([p], lr=0.1, mom=0.8), torch.optim.SGD([q], lr=0.1, momentum=0.8, nesterov=True)
    for _ in range(5):
        for t,opt in ((p, ours), (q, theirs)):
            t.grad = (t.detach()-1).sin()
            opt.step()
    torch.testing.assert_close(p, q)

@pytest.mark.parametrize('make', [np.float32, np.float64, torch.tensor], ids=['float32', 'float64', 'tensor'])
def test_muon_takes_numpys_numbers(make):
    ends = []
    for kind in (float, make):
        set_seed(0)
        p,q = torch.randn(4,6, requires_grad=True),torch.randn(5, requires_grad=True)
        opt = Muon([p, q], lr=kind(0.125), mom=kind(0.5))
        for _ in range(2):
            for t in (p, q): t.grad = (t.detach()-1).sin()
            opt.step()
        opt.lr = kind(0.25)         # as a schedule does
        opt.step()
        ends.append([p.detach(), q.detach()])
    for a,b in zip(*ends): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match='lr is .*nan'): Muon([p], lr=np.float64('nan'))

@pytest.mark.parametrize('size,norm,nfs', [(22,True,(16,24,48)), (28,False,(16,24,48)), (9,True,(2,3)),
                                           (17,True,(2,3,4,5))])
def test_net_scores_images_of_its_size(size, norm, nfs):
    net = speed_net(size, norm, nfs)
    assert net(torch.randn(3,1,size,size)).shape==(3,10)
    assert all(p.requires_grad for p in net.parameters())

@pytest.mark.parametrize('mixed', [True, False])
def test_recipe_learns_to_tell_stripes(mixed):
    set_seed(0)
    y = torch.randint(2, (1536,))
    x = torch.randint(80, (1536,28,28))
    x[y==0,::4] += 120          # rows
    x[y==1,:,::4] += 120        # columns
    ds = Dataset(x.to(torch.uint8), y)
    learn = speed_learner(ds, ds, shift=1, mixed=mixed)
    assert any(isinstance(cb, MixedPrecisionCB) for cb in learn.cbs)==mixed
    learn.fit(3)
    assert learn.history[-1]['acc']>0.95, learn.history
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}

@pytest.mark.parametrize('n', [385, 386, 768])
def test_a_last_batch_of_one_image_does_no_harm(n):
    "Batch normalization over one image has no variance; that image has its turn in another epoch's order"
    ds = Dataset(torch.randint(256, (n,28,28), dtype=torch.uint8), torch.arange(n)%10)
    learn = speed_learner(ds, ds, mixed=False)
    learn.fit(2)
    used = n - (n%384==1)
    assert [row['n'] for row in learn.history]==[used, n, used, n]

def test_bfloat16_only_by_itself_where_it_is_fast(monkeypatch):
    ds = Dataset(torch.zeros(4,28,28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    for has in True,False:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': has})
        assert bfloat16_is_fast()==has
        assert any(isinstance(cb, MixedPrecisionCB) for cb in speed_learner(ds, ds).cbs)==has

# ---- numbers of two bytes ----

N,BS = 88,16        # the last batch has 8 items

def learner(*cbs, opt_func=SGD, lr=0.3, ours=True):
    "A small network that always begins and goes on alike"
    set_seed(0)
    ds = Dataset(torch.randn(N, 4), torch.randint(3, (N,)))
    net = Sequential(Linear(4, 8), ReLU(), Linear(8, 3)) if ours else nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return Learner(net, DataLoaders(DataLoader(ds, BS, seed=0), DataLoader(ds, BS)), cross_entropy, lr, list(cbs), opt_func)

def float16(scale=2.**8):
    "A callback whose scale is too small to overflow here by itself"
    half = MixedPrecisionCB(torch.float16)
    half.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    return half

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def by_hand(n_epochs=2, n_accum=1, max_norm=None, opt_func=torch.optim.SGD, init_scale=2.**8):
    "What PyTorch's recipe for float16 makes of that network: its weights, and the norms of its gradients"
    learn = learner(ours=False)
    model,ds,norms = learn.model,learn.dls.train.ds,[]
    opt,scaler = opt_func(model.parameters(), lr=0.3),torch.amp.GradScaler('cpu', init_scale=init_scale)
    for _ in range(n_epochs):
        for group in torch.arange(N).split(BS*n_accum):
            for i in group.split(BS):
                with torch.autocast('cpu', torch.float16): preds = model(ds.x[i])
                scaler.scale(cross_entropy(preds.float(), ds.y[i])*len(i)/len(group)).backward()
            scaler.unscale_(opt)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or torch.inf))
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    return weights(learn),torch.stack(norms)

def like_by_hand(learn, **kwargs):
    "A learner with our network, from the same start as PyTorch's"
    learn.model.load_state_dict(learner(ours=False).model.state_dict())
    learn.fit(2, valid=False)
    wanted,norms = by_hand(**kwargs)
    torch.testing.assert_close(weights(learn), wanted, rtol=0, atol=2e-3)
    assert (wanted - weights(learner(ours=False))).abs().max()>0.05       # it has moved
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32} and not {'step', 'backward'} & {*vars(learn)}
    return norms

both = pytest.mark.parametrize('opt_func', [SGD, torch.optim.SGD], ids=['ours', 'torch'])
orders = pytest.mark.parametrize('first', [True, False])
def ordered(first, *cbs): return cbs if first else cbs[::-1]

@both
def test_float16_is_pytorchs_recipe(opt_func): like_by_hand(learner(float16(), opt_func=opt_func), opt_func=torch.optim.SGD)

@both
@orders
def test_clipping_sees_the_true_gradients(opt_func, first):
    clip = GradClip(0.2)
    norms = like_by_hand(learner(*ordered(first, float16(), clip), opt_func=opt_func), max_norm=0.2)
    torch.testing.assert_close(torch.stack(clip.norms), norms, rtol=0.02, atol=1e-3)
    assert norms.max()>0.3      # there was something to clip

@both
@orders
@pytest.mark.parametrize('max_norm', [None, 0.2])
def test_accumulation_in_float16(opt_func, first, max_norm):
    "With a last, shorter group, and a last, smaller batch; with and without clipping, which counts once for each group"
    clip = [GradClip(max_norm)] if max_norm else []
    learn = learner(*ordered(first, float16(), GradAccumulation(4), *clip), opt_func=opt_func)
    norms = like_by_hand(learn, n_accum=4, max_norm=max_norm)
    if clip: torch.testing.assert_close(torch.stack(clip[0].norms), norms, rtol=0.02, atol=1e-3)
    assert learn.step_count==len(norms)==4 and learn.history[-1]['n']==N

class Cancel(Callback):
    "Cancels two batches of three"
    def do(self):
        if self.training and self.iter%3!=2: raise CancelBatchException

@both
@pytest.mark.parametrize('order', [-20, -4, 60], ids=['before it', 'after it', 'last'])
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_backward'])
def test_a_cancelled_step_loses_no_gradient(opt_func, order, event):
    "The same as in float32: gradients that were computed wait for the next step, and nothing is scaled twice"
    ends = []
    for half in ([], [float16()]):
        cancel = type('CancelThere', (Cancel,), {event: Cancel.do, 'order': order})()
        learn = learner(cancel, *half, opt_func=opt_func, lr=0.1)
        before = weights(learn)
        learn.fit(2)
        assert learn.step_count==4 and not torch.is_autocast_enabled('cpu')
        ends.append(weights(learn) - before)
    torch.testing.assert_close(*ends, rtol=0, atol=3e-3)
    assert ends[0].abs().max()>0.05

class Overflow(Callback):
    "Makes the loss of some batches infinite"
    def after_loss(self):
        if self.iter in (1, 2): self.learner.loss = self.loss*torch.inf

def test_an_overflow_skips_its_step_and_halves_the_scale():
    half = float16()
    learn = learner(half, Overflow())
    learn.fit(1, valid=False)
    assert weights(learn).isfinite().all() and half.scaler.get_scale()==2.**6
    learn.fit(1, valid=False)       # the scale lasts
    assert half.scaler.get_scale()==2.**4

@pytest.mark.parametrize('event', ['after_loss', 'after_backward', 'after_step'])
def test_a_fit_after_one_that_failed(event):
    "It begins with a fresh scaler, which has the old one's scale, and the learner's own methods are back"
    class Fail(Callback):
        order = 60
        def do(self):
            if self.iter==2: raise RuntimeError('the plug')
    fail = type('FailThere', (Fail,), {event: Fail.do})()
    learn = learner(half := float16(), fail, Overflow())
    with pytest.raises(RuntimeError, match='the plug'): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and not {'step', 'backward'} & {*vars(learn)}
    scale = half.scaler.get_scale()
    learn.remove_cbs([cb for cb in learn.cbs if cb is not half])
    learn.fit(1)
    assert weights(learn).isfinite().all() and half.scaler.get_scale()==scale<2.**8

@pytest.mark.parametrize('dtypes', [(None, None), (torch.float16, torch.float16), (torch.bfloat16, torch.float16)])
def test_two_of_them_are_refused_by_name(dtypes):
    "`speed_learner` may have added one already, where bfloat16 is fast"
    for learn in (learner(*map(MixedPrecisionCB, dtypes)), learner(MixedPrecisionCB(dtypes[0]))):
        before,late = weights(learn),[MixedPrecisionCB(dtypes[1])] if len(learn.cbs)==1 else []
        with pytest.raises(ValueError, match='MixedPrecisionCB: this learner has two; keep one'): learn.fit(1, cbs=late)
        assert torch.equal(weights(learn), before) and not torch.is_autocast_enabled('cpu')
    learn.fit(1)        # the second one was for that fit only

def test_bfloat16_has_no_scaler():
    class See(Callback):
        def after_backward(self): assert not {'step', 'backward'} & {*vars(self.learner)} and half.scaler is None
    learn = learner(half := MixedPrecisionCB(torch.bfloat16), See())
    learn.fit(1)
    assert half.state_dict()=={'dtype': 'torch.bfloat16', 'scaler': None} and learn.history[-1]['n']==N

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, None])
def test_predictions_before_any_fit(dtype):
    learn = learner(MixedPrecisionCB(dtype))
    x = learn.dls.train.ds.x
    preds = learn.predict(x)
    torch.testing.assert_close(preds, learn.model(x).detach(), rtol=0.02, atol=0.1)
    assert preds.dtype==torch.float32 and not torch.equal(preds, learn.model(x)) and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_backward', 'after_step'])
def test_predictions_in_the_middle_of_a_batch_change_nothing(event):
    "A callback may ask the model something; that neither touches the gradients nor leaves autocast on"
    class Ask(Callback):
        busy = False
        def do(self):
            if self.busy: return        # `predict` fires before_batch too
            self.busy = True
            self.learner.predict(self.xb)
            self.busy = False
    ends = []
    for ask in ([], [type('AskThere', (Ask,), {event: Ask.do})()]):
        learn = learner(float16(), *ask)
        learn.fit(2)
        ends.append(weights(learn))
        assert not torch.is_autocast_enabled('cpu')
    assert torch.equal(*ends)

@pytest.mark.parametrize('when', ['before a fit', 'after a fit'])
def test_a_state_of_another_type_is_refused_by_name(when):
    saved = learner(float16())
    saved.fit(1)
    for here in (torch.bfloat16, None):         # by itself it takes bfloat16 on the CPU
        learn = learner(half := MixedPrecisionCB(here))
        if when=='after a fit': learn.fit(1)
        elif here is None: continue             # the device, and so the type, is not known yet
        before = weights(learn)
        with pytest.raises(ValueError, match=r'MixedPrecisionCB: dtype was torch.float16 and is torch.bfloat16 here; make it MixedPrecisionCB\(torch.float16'):
            learn.load_state_dict(saved.state_dict())
        assert torch.equal(weights(learn), before) and half.scaler is None
    other = learner(half := float16())
    other.load_state_dict(saved.state_dict())
    assert half.scaler.state_dict()==saved.cbs[0].scaler.state_dict()

def test_a_sweep_leaves_the_scale_as_it_was():
    half = float16()
    learn = learner(half, Overflow())
    learn.fit(1)
    before = half.state_dict()
    lr_find(learn, plot=False)
    assert half.state_dict()==before and before['scaler']['scale']<2.**8

@pytest.mark.parametrize('dtype', [torch.float32, 'float16', torch.int8, 16])
def test_types_that_are_not_for_it(dtype):
    with pytest.raises(ValueError, match='MixedPrecisionCB: dtype is .*torch.float16 or torch.bfloat16 is wanted'): MixedPrecisionCB(dtype)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_mixed_precision_on_a_gpu():
    half = MixedPrecisionCB()
    learn = learner(half, SetupLearnerCB('cuda'), GradClip(0.2), GradAccumulation(4))
    learn.fit(2)
    wanted = learner(SetupLearnerCB('cuda'), GradClip(0.2), GradAccumulation(4))
    wanted.fit(2)
    assert half.used==torch.float16 and half.scaler is not None
    torch.testing.assert_close(weights(learn), weights(wanted), rtol=0, atol=1e-2)
