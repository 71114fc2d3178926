"What 09_losses cannot show in a cell: the losses over arbitrary, extreme and hostile inputs"
import math, subprocess, sys
from unittest.mock import patch

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import special

from course_lib.core import test_near as near
from course_lib.losses import accuracy, bce, cross_entropy, log_softmax, logsumexp, mse, nll

steady = settings(max_examples=60, deadline=None, derandomize=True, database=None)

@st.composite
def batches(draw, scores=st.floats(-1e4, 1e4, width=32)):
    "Scores (bs, c), made of a few values that may be extreme, and class numbers (bs,)"
    bs,c = draw(st.integers(1, 6)),draw(st.integers(2, 12))
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

classifiers = pytest.mark.parametrize('f', [nll, cross_entropy, accuracy])

@classifiers
def test_checks_look_at_no_number(f):
    "On the meta device there are no numbers, so a check that waited for a GPU would fail here"
    x,y = torch.randn(4,3,device='meta'),torch.zeros(4,dtype=torch.int64,device='meta')
    assert f(x, y).shape==()
    with pytest.raises(ValueError, match='squeeze'): f(x, y[:,None])

@pytest.mark.parametrize('f', [bce, mse])
def test_checks_of_numbers_look_at_no_number(f):
    x = torch.randn(4,3,device='meta')
    assert f(x, x).shape==()
    with pytest.raises(ValueError, match='broadcast'): f(x, x[:,:1])

@classifiers
@pytest.mark.parametrize('targs', [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1), torch.ones(4)], ids=str)
def test_one_column_is_refused(f, targs):
    "Its argmax is always 0 and its softmax always 1, so neither would say anything; nor does a row of scores"
    for preds in (torch.randn(4,1), torch.randn(4)):
        with pytest.raises((ValueError, TypeError), match=f'{f.__name__}: .*one score for each item.* bce .*batch_accuracy'): f(preds, targs)

@classifiers
def test_a_single_item_is_no_batch(f):
    for targs in (torch.tensor(2), torch.tensor([2])):
        with pytest.raises(ValueError, match=r'preds\[None\]'): f(torch.randn(5), targs)
    with pytest.raises(ValueError, match='empty'): f(torch.randn(0), torch.zeros(0, dtype=torch.int64))

@classifiers
@pytest.mark.parametrize('preds,targs,advice', [
    (torch.randn(4,3), torch.tensor([[0],[2],[1],[0]]), lambda p,t: (p, t.squeeze(1))),
    (torch.randn(4,3), F.one_hot(torch.tensor([0,2,1,0])), lambda p,t: (p, t.long().argmax(1))),
    (torch.randn(4,3), F.one_hot(torch.tensor([0,2,1,0])).bool(), lambda p,t: (p, t.long().argmax(1))),
    (torch.randn(4,3), torch.tensor([0.,2.,1.,0.]), lambda p,t: (p, t.long())),
    (torch.randn(4,3), torch.tensor([0,2,1,0], dtype=torch.int32), lambda p,t: (p, t.long())),
    (torch.tensor([[1,2],[0,3]]), torch.tensor([0,1]), lambda p,t: (p.float(), t)),
    (torch.tensor([0,2,1,0]), torch.randn(4,3), lambda p,t: (t, p)),
    (F.one_hot(torch.tensor([0,2,1,0])), torch.randn(4,3), lambda p,t: (t, p.argmax(1)))], ids=range(8))
def test_the_advice_helps(f, preds, targs, advice):
    with pytest.raises((ValueError, TypeError)) as e: f(preds, targs)
    words = {'squeeze': 'targs.squeeze(1)', 'argmax': 'targs.long().argmax(1)', 'long': 'targs.long()', 'float': 'preds.float()'}
    used = next((w for name,w in words.items() if name in advice.__code__.co_names), None)
    assert (used if targs.ndim!=2 or not targs.is_floating_point() else 'swapped') in str(e.value)
    preds,targs = advice(preds, targs)
    assert f(log_softmax(preds) if f is nll else preds, targs).isfinite()

@classifiers
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_soft_labels_are_not_thrown_away(f, dtype):
    "Mixed targets are told the loss that uses them, not to take the largest"
    preds,y = torch.randn(4,3),torch.tensor([0,2,1,0])
    targs = (0.7*F.one_hot(y, 3) + 0.3*F.one_hot(y.flip(0), 3)).to(dtype)
    with pytest.raises(ValueError, match='Of class probabilities') as e: f(preds, targs)
    assert 'argmax' not in str(e.value)
    formula = str(e.value).split('the loss is ')[1]
    near(eval(formula, dict(targs=targs.float(), log_softmax=log_softmax, preds=preds)), F.cross_entropy(preds, targs.float()))

inf,nan = math.inf,math.nan
rows = [[-inf,-inf], [inf,0.], [inf,inf], [inf,-inf], [-inf,0.], [nan,0.], [nan,inf], [nan,-inf], [3e38,-3e38], [0.]]

@pytest.mark.parametrize('row', rows, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_scores_that_are_infinite_or_nearly_so(row, dtype):
    "As PyTorch's, value and gradient"
    x = torch.tensor(row, dtype=dtype)
    def value_and_grads(f):
        y = x.clone().requires_grad_()
        out = f(y)
        out.sum().backward()
        return out.detach(),y.grad
    for ours,theirs in ((logsumexp, lambda o: torch.logsumexp(o, -1)), (log_softmax, lambda o: F.log_softmax(o, dim=-1))):
        for a,b in zip(value_and_grads(ours), value_and_grads(theirs)): torch.testing.assert_close(a, b, equal_nan=True)
    assert logsumexp(x[None], keepdim=True).shape==(1,1)

def test_equal_scores_share_whatever_their_size():
    for size in (3e38, -3e38):
        x = torch.full((2,), size, requires_grad=True)
        logsumexp(x).backward()
        assert x.grad.tolist()==[0.5, 0.5]          # PyTorch's says 1 and 1 here
        near(log_softmax(x), torch.full((2,), -math.log(2)))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_about_as_exact_as_pytorchs(dtype):
    x = (torch.randn(8,200, generator=torch.Generator().manual_seed(0))*5).to(dtype)
    exact = torch.log_softmax(x.double(), -1)
    for ours,theirs,wanted in ((log_softmax(x), torch.log_softmax(x, -1), exact), (logsumexp(x), torch.logsumexp(x, -1), torch.logsumexp(x.double(), -1))):
        assert ours.dtype==dtype and (ours-wanted).abs().max() <= 3*(theirs-wanted).abs().max() + torch.finfo(dtype).eps

scores = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0., -0., 1e-30, 88.8, -104., 1e37, -1e37])
@steady
@given(st.lists(st.tuples(scores, st.sampled_from([0., 1., 0.5, 0.1])), min_size=1, max_size=8))
def test_bce_is_right(pairs):
    x,t = torch.tensor(pairs).T
    def surprise(s): return np.logaddexp(0., -s.double().numpy())       # -ln sigmoid, in 64 bits
    exact = (t.double().numpy()*surprise(x) + (1-t.double().numpy())*surprise(-x)).mean()
    near(bce(x, t), exact, eps=1e-7, rel=1e-6)
    if x.abs().max() < 1e30:
        for ours,theirs in zip(value_and_grad(bce, x, t), value_and_grad(F.binary_cross_entropy_with_logits, x, t)):
            near(ours, theirs, eps=1e-6, rel=1e-6)
    near(value_and_grad(bce, x, t)[1], (torch.sigmoid(x)-t)/len(x), eps=1e-6)     # at 0 as well: a half minus the target

@steady
@given(shapes, shapes)
def test_bce_takes_equal_shapes_only(p, t):
    torch.manual_seed(0)
    preds,targs = torch.randn(p),torch.rand(t)
    if p==t and 0 not in p: return near(bce(preds, targs), F.binary_cross_entropy_with_logits(preds, targs))
    with pytest.raises(ValueError, match='bce: predictions are') as e: bce(preds, targs)
    assert str(p) in str(e.value) and (p==t or str(t) in str(e.value))

def test_bce_is_cross_entropy_with_a_second_score_of_0():
    x,t = torch.randn(32, dtype=torch.float64)*20,torch.randint(2, (32,))
    near(bce(x, t), cross_entropy(torch.stack([torch.zeros_like(x), x], 1), t), rel=1e-9)
    near(bce(torch.zeros(5), torch.ones(5)), math.log(2))

@pytest.mark.parametrize('dtype', [torch.bool, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_bce_takes_targets_of_any_type(dtype):
    x,t = torch.randn(32),torch.randint(2, (32,))
    loss = bce(x, t.to(dtype))
    assert loss.dtype==torch.float32
    near(loss, F.binary_cross_entropy_with_logits(x, t.float()))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_every_loss_is_computed_in_32_bits_or_more(dtype):
    "Differences of 300 have squares beyond float16"
    x = torch.tensor([300., -300., 2.]).to(dtype).requires_grad_()
    t = torch.tensor([0., 1., 1.])
    for f,ref in ((mse, F.mse_loss), (bce, F.binary_cross_entropy_with_logits)):
        for targs in (t, t.to(dtype)):
            loss = f(x, targs)
            assert loss.dtype==torch.float32 and loss.isfinite() and torch.autograd.grad(loss, x)[0].dtype==dtype
            near(loss, ref(x.float(), t))
    logp = torch.log_softmax(torch.randn(300,10), -1).to(dtype)
    loss = nll(logp, torch.zeros(300, dtype=torch.int64))
    assert loss.dtype==torch.float32
    near(loss, F.nll_loss(logp.float(), torch.zeros(300, dtype=torch.int64)))
    for f in (mse, bce): assert f(x.double(), t.double()).dtype==torch.float64

@pytest.mark.parametrize('f', [bce, mse])
def test_predictions_that_are_no_floats(f):
    with pytest.raises(TypeError, match=rf'{f.__name__}: .*int64.*preds.float\(\)'): f(torch.tensor([1,0]), torch.tensor([1,0]))
    with pytest.raises(TypeError, match='swapped'): f(torch.tensor([1,0]), torch.tensor([1.,0.]))
    with pytest.raises(ValueError, match='empty'): f(torch.ones(0), torch.ones(0))

@pytest.mark.parametrize('targs', [[-1.,1.,-1.], [0.,255.,0.], [0,9,3], [0.,1.,nan], [0.,1.,1.01]], ids=str)
def test_bce_refuses_what_is_no_probability(targs):
    "Labels of -1 and 1, raw pixels, classes, nan: with them the loss has no smallest value, or is nan"
    with pytest.raises(ValueError, match='bce: targets go from'): bce(torch.randn(3), torch.tensor(targs))

def test_bce_notices_two_that_are_swapped():
    x,t = torch.tensor([3., -2., 0.5]),torch.tensor([1., 0., 1.])
    with pytest.raises(ValueError, match=r'targets go from -2 to 3.*bce\(preds, targs\)'): bce(t, x)
    for dtype in (torch.bool, torch.uint8, torch.float16): near(bce(x, t.to(dtype)), bce(x, t))

def test_nll_refuses_scores_and_probabilities():
    x,y = torch.tensor([[2., 0.], [0., 3.]]),torch.tensor([0, 1])
    for wrong in (x, x.softmax(1)):
        with pytest.raises(ValueError, match=r'nll: a true class has the log-probability .*cross_entropy'): nll(wrong, y)
    near(nll(torch.full((2,2), 1e-5), y), -1e-5)         # rounding may do that
    for rows in ([[0., -inf], [-inf, 0.]], [[-1., nan], [nan, -1.]]): nll(torch.tensor(rows), y)

@pytest.mark.parametrize('bad', [3, -1, -100])
def test_accuracy_refuses_what_is_no_class(bad):
    "It would count as wrong: labels from 1 to 10 would make a perfect model look bad"
    with pytest.raises(IndexError, match=rf'accuracy: targs\[1\] is {bad}, .*classes are 0 to 2'):
        accuracy(torch.randn(4,3), torch.tensor([0, bad, 1, 2]))

@pytest.mark.parametrize('bad', [True, -0.1, 1.1, nan, inf, '0.1', [0.1]])
def test_what_is_no_label_smoothing(bad):
    with pytest.raises(ValueError, match='cross_entropy: label_smoothing is'): cross_entropy(torch.randn(4,3), torch.zeros(4, dtype=torch.int64), bad)

def test_label_smoothing_may_be_any_number():
    x,y = torch.randn(4,3),torch.tensor([0,2,1,0])
    for eps in (0, 0., 1, np.float32(0.25), np.float64(0.25), torch.tensor(0.25)):
        loss = cross_entropy(x, y, eps)
        near(loss, F.cross_entropy(x, y, label_smoothing=float(eps)))
        assert loss.dtype==torch.float32

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
    assert torch.autograd.gradgradcheck(lambda o: bce(o, torch.rand(3,4,dtype=torch.float64, generator=torch.Generator().manual_seed(0))), x)
    for f in (cross_entropy, lambda x,y: nll(log_softmax(x), y)): assert torch.autograd.gradgradcheck(lambda o: f(o, y), x)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    "The same as on the CPU; and where batch and targets are on two devices, the labels are not blamed"
    x,y,t = torch.randn(32,10),torch.randint(10, (32,)),torch.rand(32,10)
    for f,targs in ((cross_entropy,y), (lambda x,y: cross_entropy(x, y, 0.1),y), (lambda x,y: nll(log_softmax(x), y),y), (bce,t), (mse,t)):
        for a,b in zip(value_and_grad(f, x.cuda(), targs.cuda()), value_and_grad(f, x, targs)):
            assert a.device.type=='cuda'
            near(a, b)
    near(accuracy(x.cuda(), y.cuda()), accuracy(x, y))
    near(logsumexp(torch.tensor([[-inf,-inf], [inf,0.]]).cuda()), torch.tensor([-inf, inf]))
    with pytest.raises(ValueError, match='squeeze'): cross_entropy(x.cuda(), y[:,None].cuda())
    with pytest.raises(RuntimeError, match='device'): cross_entropy(x.cuda(), y-1)

def test_stands_alone():
    "Importing losses imports what it is made of, and no plots"
    code = "import sys, course_lib.losses; print(*sorted(m for m in sys.modules if m.startswith(('course_lib.', 'matplotlib', 'pandas'))))"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert res.stdout.split()==['course_lib.core', 'course_lib.linear', 'course_lib.losses']
