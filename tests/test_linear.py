"What chapter 04 cannot test in passing: properties over many inputs, and results that do not depend on the number of threads"
import platform, tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st

from course_lib.linear import batch_accuracy, calc_grad, gd_step, init_params, linear1, mnist_loss, train_epoch, train_model, validate_epoch

untimed = settings(deadline=None)    # the first call of an operation takes much longer than the others

shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
seeds = st.integers(0, 2**31)

def example(shape, seed):
    "Random scores and targets of `shape`, in double precision"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)*5, torch.randint(2, shape, generator=g)

@untimed
@given(shapes, seeds)
def test_loss_is_a_mean_distance(shape, seed):
    preds,targs = example(shape, seed)
    loss = mnist_loss(preds, targs)
    assert loss.shape==() and 0 <= loss <= 1
    torch.testing.assert_close(loss, (preds.sigmoid()-targs).abs().mean())
    torch.testing.assert_close(loss + mnist_loss(-preds, targs), torch.ones((), dtype=torch.float64))   # as wrong as its mirror image is right
    torch.testing.assert_close(mnist_loss(-preds, 1-targs), loss)                                       # threes and sevens are treated alike
    torch.testing.assert_close(mnist_loss(preds, targs.double()), loss)

@untimed
@given(shapes, shapes)
def test_different_shapes_are_refused(shape, other):
    assume(shape!=other)
    for f in (mnist_loss, batch_accuracy):
        with pytest.raises(ValueError, match=f'^{f.__name__}: predictions are ') as e: f(torch.zeros(shape), torch.zeros(other))
        assert str(shape) in str(e.value) and str(other) in str(e.value)
        try: square = torch.broadcast_shapes(shape, other)
        except RuntimeError: assert 'one target for each prediction' in str(e.value)
        else: assert f'broadcast to {tuple(square)}' in str(e.value)

@untimed
@given(shapes, seeds)
def test_accuracy_counts_the_right_side(shape, seed):
    preds,targs = example(shape, seed)
    right = sum((p>0)==(t==1) for p,t in zip(preds.flatten().tolist(), targs.flatten().tolist()))
    torch.testing.assert_close(batch_accuracy(preds, targs), torch.tensor(right/preds.numel()))

@untimed
@given(st.integers(1, 20), st.integers(1, 9), seeds)
def test_gradient_and_step(n, ni, seed):
    preds,targs = example((n,), seed)
    xb = torch.randn(n, ni, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w,b = (init_params(size).detach().double().requires_grad_() for size in (ni, 1))
    model = partial(linear1, w=w, b=b)
    loss = calc_grad(xb, targs, model)
    assert not loss.requires_grad
    p = model(xb).sigmoid().detach()
    slopes = torch.where(targs==1, -1., 1.)*p*(1-p)/n
    torch.testing.assert_close(w.grad, xb.T@slopes)
    torch.testing.assert_close(b.grad, slopes.sum()[None])
    expected = [(o.detach() - 0.1*o.grad) for o in (w,b)]
    gd_step((o for o in (w,b)), lr=0.1)
    for o,e in zip((w,b), expected):
        torch.testing.assert_close(o.detach(), e)
        assert o.is_leaf and o.requires_grad and not o.grad.any()

def test_classic_numbers_with_one_and_two_threads():
    from course_lib.dataloader import DataLoader, Dataset
    from course_lib.datasets import threes_and_sevens
    row = tomllib.loads((Path(__file__).parent.parent/'nbs'/'ledger.toml').read_text(encoding='utf-8'))['04_linear']['classic_accs']
    train_dl,valid_dl = (DataLoader(Dataset(x.flatten(1), y[:,None]), bs=256) for x,y in threes_and_sevens())
    def loss_func(preds, targs): return torch.where(targs==1, 1-preds.sigmoid(), preds.sigmoid()).mean()    # (n, n): the trap
    def run():
        torch.manual_seed(0)
        params = [init_params(784), init_params(1)]
        model = partial(linear1, w=params[0], b=params[1])
        for _ in row['expected']:
            train_epoch(model, train_dl, partial(gd_step, params, 1.), loss_func)
            yield torch.stack([((model(xb)>0)==yb).float().mean() for xb,yb in valid_dl]).mean().item()
    tol = 0 if (platform.system(), platform.machine())==('Linux', 'x86_64') else row['rounding']
    before = torch.get_num_threads()
    try:
        for n in (1,2):
            torch.set_num_threads(n)
            for acc,expected in zip(run(), row['expected'], strict=True): assert abs(round(acc, 4) - expected) <= tol + 1e-9
    finally: torch.set_num_threads(before)

def small_task():
    "A batch of ten items in loaders for training and validation, a fresh model and its parameters"
    xb,yb = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)),torch.arange(10)%2
    torch.manual_seed(0)
    params = [init_params(3), init_params(1)]
    return SimpleNamespace(train=[(xb,yb)], valid=[(xb,yb)]),partial(linear1, w=params[0], b=params[1]),params

@pytest.mark.parametrize('number', [np.int64, np.float32, np.float64, torch.tensor])
def test_numbers_of_numpy_and_torch_do_as_well(number):
    dls,model,params = small_task()
    wanted = train_model(model, dls, partial(gd_step, params, 1), 2)
    dls,model,params2 = small_task()
    assert train_model(model, dls, partial(gd_step, params2, number(1)), np.int64(2))==wanted and len(wanted)==2
    assert torch.equal(params[0], params2[0]) and params2[0].dtype==torch.float32
    assert init_params((np.int64(2), 3)).shape==(2, 3) and init_params(np.int64(2)).shape==(2,)

@pytest.mark.parametrize('bad', [None, True, float('nan'), float('inf'), '1', -1.])
def test_other_numbers_are_refused_before_anything_changes(bad):
    dls,model,params = small_task()
    calc_grad(*dls.train[0], model)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match='gd_step: lr is'): gd_step(params, bad)
    with pytest.raises(ValueError, match='train_model: n_epochs is'): train_model(model, dls, partial(gd_step, params, 1.), bad)
    assert torch.equal(params[0], before)

def test_nothing_is_recorded_in_validation():
    recorded = []
    def model(xb): recorded.append(torch.is_grad_enabled()); return xb.sum(1)
    validate_epoch(model, small_task()[0].valid)
    assert recorded==[False] and torch.is_grad_enabled()

def test_loader_without_batches_is_refused():
    batches = iter(small_task()[0].valid)
    validate_epoch(lambda xb: xb.sum(1), batches)
    with pytest.raises(ValueError, match='no batches; a generator is empty'): validate_epoch(lambda xb: xb.sum(1), batches)
