"What 09_losses cannot show in a cell: the losses over arbitrary, extreme and hostile inputs"
import math, subprocess, sys
from unittest.mock import patch

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import special

from course_lib.core import test_near as near
from course_lib.losses import accuracy, cross_entropy, log_softmax, logsumexp, mse, nll

steady = settings(max_examples=60, deadline=None, derandomize=True, database=None)

@st.composite
def batches(draw, scores=st.floats(-1e4, 1e4, width=32)):
    "Scores (bs, c), made of a few values that may be extreme, and class numbers (bs,)"
    bs,c = draw(st.integers(1, 6)),draw(st.integers(1, 12))
    pool = torch.tensor(draw(st.lists(scores, min_size=1, max_size=5)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return pool[torch.randint(len(pool), (bs,c), generator=rng)],torch.randint(c, (bs,), generator=rng)

def value_and_grad(f, x, y, **kwargs):
    x = x.clone().requires_grad_()
    loss = f(x, y, **kwargs)
    return loss.detach(),torch.autograd.grad(loss, x)[0]

@steady
@given(batches())
def test_log_softmax_is_right(b):
    x,_ = b
    near(log_softmax(x), special.log_softmax(x.double().numpy(), axis=-1), eps=1e-6, rel=1e-6)
    near(log_softmax(x), F.log_softmax(x, dim=-1), eps=1e-6, rel=1e-6)
    near(logsumexp(x), special.logsumexp(x.double().numpy(), axis=-1), eps=1e-6, rel=1e-6)
    near(logsumexp(x, keepdim=True), torch.logsumexp(x, -1, keepdim=True), eps=1e-6, rel=1e-6)

@steady
@given(batches(), st.floats(-1e4, 1e4))
def test_laws_of_logsumexp(b, k):
    "It lies between the largest score and ln c above it, moves with its input, and its gradient is softmax"
    x = b[0].double()
    res,m = logsumexp(x),x.amax(-1)
    assert (res>=m).all() and (res <= m + math.log(x.shape[-1]) + 1e-9).all()
    near(logsumexp(x+k), res+k, eps=1e-8)
    near(log_softmax(x+k), log_softmax(x), eps=1e-8)
    near(torch.func.grad(lambda o: logsumexp(o).sum())(x), F.softmax(x, dim=-1), eps=1e-9)

@steady
@given(batches(), st.sampled_from([0., 0.1, 1.]), st.sampled_from([torch.float32, torch.float64]))
def test_cross_entropy_equals_pytorchs(b, eps, dtype):
    x,y = b[0].to(dtype),b[1]
    for ours,theirs in zip(value_and_grad(cross_entropy, x, y, label_smoothing=eps),
                           value_and_grad(F.cross_entropy, x, y, label_smoothing=eps)):
        assert ours.isfinite().all() and ours.dtype==dtype
        near(ours, theirs, eps=1e-6, rel=1e-6)

@steady
@given(batches())
def test_cross_entropy_is_nll_of_log_softmax(b):
    x,y = b
    for fast,plain in zip(value_and_grad(cross_entropy, x, y), value_and_grad(lambda x,y: nll(log_softmax(x), y), x, y)):
        near(fast, plain, eps=1e-6, rel=1e-6)
    expected = (F.softmax(x.double(), dim=-1) - F.one_hot(y, x.shape[1])) / len(y)
    near(value_and_grad(cross_entropy, x, y)[1], expected, eps=1e-5)

@steady
@given(batches(scores=st.floats(-100, 100, width=32) | st.just(-math.inf)))
def test_impossible_classes(b):
    "A score of -inf is a class that cannot be: same loss and gradient as PyTorch's, inf and nan included"
    x,y = b
    for ours,theirs in zip(value_and_grad(cross_entropy, x, y), value_and_grad(F.cross_entropy, x, y)): near(ours, theirs, rel=1e-6)

@steady
@given(batches(), st.data())
def test_every_wrong_class_is_named(b, data):
    x,y = b
    i,c = data.draw(st.integers(0, len(y)-1)),x.shape[1]
    y[i] = data.draw(st.integers(-2**40, -1) | st.integers(c, 2**40))
    for f in (nll, cross_entropy):
        with pytest.raises(IndexError, match=rf'{f.__name__}: targs\[{i}\] is {y[i]}, .* classes are 0 to {c-1}\.'): f(x, y)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
@steady
@given(batches(), shapes)
def test_every_other_shape_of_targets_is_refused(b, shape):
    x,y = b
    if shape==tuple(y.shape): return
    for f in (nll, cross_entropy, accuracy):
        with pytest.raises(ValueError, match=f.__name__) as e: f(x, torch.zeros(shape, dtype=torch.int64))
        assert str(tuple(x.shape)) in str(e.value) and str(shape) in str(e.value)

@steady
@given(shapes, shapes)
def test_mse_takes_equal_shapes_only(p, t):
    torch.manual_seed(0)
    preds,targs = torch.randn(p),torch.randn(t)
    if p==t and 0 not in p: return near(mse(preds, targs), F.mse_loss(preds, targs))
    with pytest.raises(ValueError, match='mse: predictions are') as e: mse(preds, targs)
    assert str(p) in str(e.value) and (p==t or str(t) in str(e.value))

@steady
@given(batches())
def test_accuracy_counts(b):
    x,y = b
    near(accuracy(x, y), sum(row.index(max(row))==t for row,t in zip(x.tolist(), y.tolist()))/len(y))

@pytest.mark.parametrize('dtype', [torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64])
def test_targets_of_other_types(dtype):
    for f in (nll, cross_entropy, accuracy):
        with pytest.raises(TypeError, match=rf'{dtype}.*targs.long\(\)'): f(torch.randn(4,3), torch.ones(4).to(dtype))

@pytest.mark.parametrize('shape', [(), (3,), (2,3,4)])
def test_predictions_of_other_shapes(shape):
    for f in (nll, cross_entropy, accuracy):
        with pytest.raises(ValueError, match=r'\(bs, c\)'): f(torch.zeros(shape), torch.zeros(shape[:1], dtype=torch.int64))

@pytest.mark.parametrize('f', [nll, cross_entropy, accuracy])
def test_checks_look_at_no_number(f):
    "On the meta device there are no numbers, so a check that waited for a GPU would fail here"
    x,y = torch.randn(4,3,device='meta'),torch.zeros(4,dtype=torch.int64,device='meta')
    assert f(x, y).shape==()
    with pytest.raises(ValueError, match='squeeze'): f(x, y[:,None])

def test_errors_of_others_are_not_translated():
    "Only a wrong class number is explained as one"
    with patch.object(torch.Tensor, 'gather', side_effect=RuntimeError('out of memory')):
        with pytest.raises(RuntimeError, match='out of memory'): cross_entropy(torch.randn(4,3), torch.zeros(4,dtype=torch.int64))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    x,y = (torch.randn(64,10)*30).to(dtype).requires_grad_(),torch.randint(10,(64,))
    loss = cross_entropy(x, y)
    assert loss.dtype==torch.float32 and torch.autograd.grad(loss, x)[0].dtype==dtype
    near(loss, F.cross_entropy(x.float(), y))
    with torch.autocast('cpu', torch.bfloat16):
        preds = torch.randn(8,4)@torch.randn(4,3)
        assert preds.dtype==torch.bfloat16 and cross_entropy(preds, torch.zeros(8, dtype=torch.int64)).dtype==torch.float32

def test_second_derivatives():
    x,y = torch.randn(3,4,dtype=torch.float64,requires_grad=True),torch.tensor([0,3,1])
    for f in (cross_entropy, lambda x,y: nll(log_softmax(x), y)): assert torch.autograd.gradgradcheck(lambda o: f(o, y), x)

def test_stands_alone():
    code = "import sys, course_lib.losses; print(*[m for m in sys.modules if m.startswith(('course_lib.', 'matplotlib', 'fastcore'))])"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert res.stdout.split()==['course_lib.losses']
