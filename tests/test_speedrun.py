"The speedrun's parts: pixels as they should be, orthogonalized steps against decompositions, and a recipe that learns"
import re

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from course_lib.callbacks import SetupLearnerCB
from course_lib.core import set_seed
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.learner import Callback, CancelFitException, Learner
from course_lib.losses import cross_entropy
from course_lib.module import Flatten, Linear, Sequential
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
