"Every operation of course_lib.autograd against PyTorch and against nudges, over shapes that hypothesis draws"
import gc
import operator
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import broadcastable_shapes, mutually_broadcastable_shapes

from course_lib.autograd import Var, backward, graph, no_grad, tape, unbroadcast, where

some = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)
dims = st.integers(1, 3)
shapes = st.lists(dims, max_size=3).map(tuple)
pairs = mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3).map(lambda o: o.input_shapes)

def numbers(seed, *shapes):
    "Float64 tensors away from 0 and, with probability one, from ties: 0.5 to 1.5, either sign"
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(s, generator=g, dtype=torch.float64) + 0.5) * (torch.randint(2, s, generator=g)*2 - 1)
            for s in shapes]

def nudged(f, xs, g, by=1e-6):
    "Gradients of (f(*xs)*g).sum(), one number at a time"
    def total(): return (f(*xs)*g).sum()
    grads = [torch.zeros_like(x) for x in xs]
    for x,grad in zip(xs, grads):
        for i in np.ndindex(tuple(x.shape)):
            was = x[i].item()
            x[i] = was + by; up = total()
            x[i] = was - by; down = total()
            x[i] = was
            grad[i] = (up-down)/(2*by)
    return grads

def check(f, xs, seed=0):
    ours,theirs = [Var(x.clone()) for x in xs],[x.clone().requires_grad_() for x in xs]
    out,ref = f(*ours),f(*theirs)
    torch.testing.assert_close(out.data, ref.detach(), rtol=1e-12, atol=1e-12)
    g = torch.randn(ref.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(g); ref.backward(g)
    for v,t,n in zip(ours, theirs, nudged(f, xs, g), strict=True):
        assert v.grad.shape==v.shape and not v.grad.requires_grad
        torch.testing.assert_close(v.grad, t.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(v.grad, n, rtol=1e-6, atol=1e-6)

binary = {'+': lambda a,b: a+b, '-': lambda a,b: a-b, '*': lambda a,b: a*b, '/': lambda a,b: a/b,
          'where': lambda a,b: torch.where(a<=b, a, b), 'where, one side': lambda a,b: torch.where(a>0, 2., b) + a,
          'twice': lambda a,b: a*b + a/b - b*b}
unary = {'-': lambda a: -a, '**3': lambda a: a**3, '**-2': lambda a: a**-2, '**0': lambda a: a**0,
         '**1': lambda a: a**1, 'exp': lambda a: a.exp(), 'log': lambda a: (a*a).log(),
         'sigmoid': lambda a: a.sigmoid(), 'relu': lambda a: a.relu(),
         'sum': lambda a: a.sum(), 'mean': lambda a: a.mean(), '2-a': lambda a: 2-a, '2/a': lambda a: 2/a,
         'flat': lambda a: a.reshape(-1)*a.reshape(-1), 'reused': lambda a: a.sigmoid()*a + a}

@pytest.mark.parametrize('name', binary)
@some
@given(pairs, seeds)
def test_binary(name, shapes, seed): check(binary[name], numbers(seed, *shapes), seed)

@pytest.mark.parametrize('name', unary)
@some
@given(shapes, seeds)
def test_unary(name, shape, seed): check(unary[name], numbers(seed, shape), seed)

@some
@given(dims, dims, dims, st.booleans(), st.booleans(), seeds)
def test_matmul(n, k, m, left_vector, right_vector, seed):
    sizes = (k,) if left_vector else (n,k), (k,) if right_vector else (k,m)
    a,b = xs = numbers(seed, *sizes)
    check(lambda a,b: a@b, xs, seed)
    check(lambda a: a@b, [a], seed)
    check(lambda b: a@b, [b], seed)

@some
@given(st.lists(dims, min_size=1, max_size=3).map(tuple), st.data(), st.booleans(), seeds)
def test_reductions(shape, data, keepdim, seed):
    dim = data.draw(st.integers(-len(shape), len(shape)-1))
    xs = numbers(seed, shape)
    check(lambda a: a.sum(dim, keepdim), xs, seed)
    check(lambda a: a.mean(dim, keepdim), xs, seed)

@some
@given(st.lists(dims, max_size=4).map(tuple), st.data(), st.booleans(), seeds)
def test_reductions_over_several_axes(shape, data, keepdim, seed):
    "Any axes in any order, counted from either end; none at all means all"
    axes = data.draw(st.lists(st.integers(0, len(shape)-1), unique=True)) if shape else []
    axes = tuple(i - len(shape)*data.draw(st.booleans()) for i in axes)
    xs = numbers(seed, shape)
    for dim in (axes, None, list(axes)):
        check(lambda a: a.sum(dim, keepdim), xs, seed)
        check(lambda a: a.mean(dim, keepdim), xs, seed)

def test_reductions_of_nothing_and_with_numpys_axes():
    x = torch.arange(6.).reshape(2,3)
    assert torch.equal(Var(x).sum(np.int64(1)).data, x.sum(1)) and torch.equal(Var(x).mean((np.int64(0), 1)).data, x.mean())
    assert Var(torch.ones(0)).mean().data.isnan() and Var(torch.ones(0,3)).mean(1).shape==(0,)
    for bad in (2, (0,5), (0,0)):
        with pytest.raises((IndexError, RuntimeError)): Var(x).sum(bad)

@some
@given(dims, dims, seeds)
def test_transpose(n, m, seed): check(lambda a: a.T*3, numbers(seed, (n,m)), seed)

@some
@given(shapes, st.data())
def test_unbroadcast(shape, data):
    big = torch.broadcast_shapes(shape, data.draw(broadcastable_shapes(shape, max_dims=4, max_side=3)))
    g = torch.randn(big, dtype=torch.float64)
    torch.testing.assert_close(unbroadcast(g, shape), g.sum_to_size(shape))

@some
@given(pairs, st.sampled_from('+-*/'), seeds)
def test_constants_on_either_side(shapes, op, seed):
    a,b = numbers(seed, *shapes)
    check(lambda a: binary[op](a, b), [a], seed)
    check(lambda b: binary[op](a, b), [b], seed)

@some
@given(st.lists(st.tuples(st.sampled_from('+-*'), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=12),
       seeds)
def test_any_graph(steps, seed):
    "Operations between any two earlier results, so that Vars are used many times"
    def f(*xs):
        made = list(xs)
        for op,i,j in steps: made.append(binary[op](made[i%len(made)], made[j%len(made)]).sigmoid())
        return made[-1].sum() + sum(o.sum() for o in xs)
    check(f, numbers(seed, (2,), (2,)), seed)

@some
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12))
def test_tape_is_topological(steps):
    made = [Var(1.), Var(2.)]
    for i,j in steps: made.append(made[i%len(made)] + made[j%len(made)])
    place = {v: i for i,v in enumerate(tape(made[-1]))}
    assert len(place)==len(tape(made[-1])) and place[made[-1]]==len(place)-1
    assert all(place[p]<place[v] for v in place for p,_ in v.parents)

def test_deep_chain_runs_and_is_freed():
    x = Var(1.)
    y = x
    for _ in range(10_000): y = y*1.
    y.backward()
    assert x.grad.item()==1
    for _ in range(30_000): y = y + 1
    backward(y)
    assert x.grad.item()==2
    del y; gc.collect()

def test_gradients_add_up_and_are_nobody_elses():
    a,b = Var(torch.ones(3)),Var(torch.ones(3))
    y = (a + b).sum()
    y.backward(); y.backward()
    assert a.grad.tolist()==[2.]*3
    a.grad.zero_()
    assert b.grad.tolist()==[2.]*3 and y.grad.item()==2

def test_gradient_has_the_type_of_its_var():
    a = Var(torch.ones(3))
    (a*torch.ones(3, dtype=torch.float64)).sum().backward()
    assert a.grad.dtype==torch.float32
    (a*torch.arange(3)).sum().backward()
    assert a.grad.tolist()==[1., 2., 3.]

def test_numpy_scalars_and_arrays():
    v = Var(2.)
    for two in (np.float32(2), np.float64(2), np.int64(2)): assert (two*v).item()==4 and (v-two).item()==0
    with pytest.raises(TypeError, match='as_tensor'): np.ones(2)*v
    with pytest.raises(TypeError, match='as_tensor'): v*np.ones(2)

def test_torch_autograd_is_not_used(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("PyTorch's autograd was used")
    for name in ('backward', 'grad'): monkeypatch.setattr(torch.autograd, name, refuse)
    w,x = Var(torch.ones(3,1)),torch.ones(4,3)
    with torch.no_grad():
        y = where(x[:,:1]>0, (x@w).relu().sigmoid(), 0.).mean()
        y.backward()
    assert not y.data.requires_grad and not w.grad.requires_grad and w.grad.abs().min()>0
    with pytest.raises(ValueError, match='detach'): w*torch.ones(3, 1, requires_grad=True)

def test_slopes_of_the_inputs_of_an_mlp():
    from course_lib.linear import mnist_loss
    from course_lib.mlp import MLP
    net,xb,yb = MLP(5, 4, 1),torch.randn(6,5),torch.tensor([[1.],[0.]]*3)
    x,ref = Var(xb),xb.clone().requires_grad_()
    mnist_loss(net(ref), yb).backward()
    net.layers = [(Var(w.detach()), Var(b.detach())) for w,b in net.layers]
    mnist_loss(net(x), yb).backward()
    torch.testing.assert_close(x.grad, ref.grad)

def test_graph_text():
    a,b = Var(2., name='a'),Var(torch.ones(2), name='b')
    y = (a*b).sum()
    y.backward()
    text = graph(y)
    assert '"1 a" [label="a\\ndata 2\\ngrad 2"]' in text and '"2 b" -> "3 *"' in text and 'grad (2,)' in text
    assert 'grad –' in graph(a*b)

def test_import_is_light():
    code = ("import sys, course_lib.autograd as a\n"
            "print([m for m in sys.modules if m.startswith(('course_lib.', 'matplotlib', 'pandas'))])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip()=="['course_lib.autograd']"

in_place = {o: (getattr(operator, o), getattr(operator, f'i{o}')) for o in ('add', 'sub', 'mul', 'truediv', 'pow', 'matmul')}
each_in_place = pytest.mark.parametrize('name', in_place)

def operand(name): return 3 if name=='pow' else torch.tensor([[2., 1.], [0.5, 4.]]) if name=='matmul' else 1.5

@each_in_place
def test_in_place_operations_on_a_parameter_are_refused(name):
    "Nothing changes, neither the parameter nor another name of it"
    p = q = Var(torch.ones(2,2))
    with pytest.raises(TypeError, match=r'Var: .*= would make .* no_grad\(\)'): p = in_place[name][1](p, operand(name))
    assert p is q and p.data.tolist()==[[1.,1.]]*2 and not p.parents

@each_in_place
def test_in_place_operations_on_a_result_are_recorded(name):
    op,op_in_place = in_place[name]
    def f(x):
        y = x*2
        z = y
        y = op_in_place(y, operand(name))
        return (y*z).sum() if isinstance(x, Var) else None
    a,b = Var(torch.full((2,2), 0.7)),torch.full((2,2), 0.7, requires_grad=True)
    f(a).backward()
    y = b*2
    (op(y, operand(name))*y).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)

@each_in_place
@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: Var(torch.as_tensor(o, dtype=torch.float32))], ids=['constant', 'Var'])
def test_within_no_grad_they_change_the_data(name, wrap):
    if name=='pow' and isinstance(wrap(3), Var): return
    op,op_in_place = in_place[name]
    start = torch.tensor([[1., 2.], [3., 4.]])
    p = q = Var(start.clone())
    with no_grad(): p = op_in_place(p, wrap(operand(name)))
    assert p is q and not p.parents and p.requires_grad
    torch.testing.assert_close(p.data, op(start, operand(name)))
    (p*p).sum().backward()
    torch.testing.assert_close(p.grad, 2*p.data)

def test_training_as_with_pytorch():
    "`w -= lr*w.grad` within no_grad: the same steps"
    v,t = Var(torch.tensor([3., -2.])),torch.tensor([3., -2.], requires_grad=True)
    for w,block in ((v,no_grad), (t,torch.no_grad)):
        for _ in range(5):
            ((w*w - w)**2).sum().backward()
            with block(): w -= 0.01*w.grad
            w.grad = None
    torch.testing.assert_close(v.data, t.detach())

def test_no_grad_records_nothing_and_ends():
    w = Var(torch.ones(3))
    @no_grad()
    def loss(): return (w*w).sum()
    def recorded(): return bool((w*2).parents)
    with no_grad():
        y = loss()
        assert not recorded()
        with no_grad(): pass
        assert not recorded()               # the inner block has not switched it on again
    assert recorded()
    with pytest.raises(ZeroDivisionError):
        with no_grad(): 1/0
    assert recorded()
    assert not y.parents and not y.requires_grad and y.item()==3
    with pytest.raises(ValueError, match='nothing leads back .* no_grad'): y.backward()
    (y*w).sum().backward()                  # afterwards it is a constant like any other
    assert w.grad.tolist()==[3.]*3 and y.grad is None
    with torch.no_grad(): assert recorded()     # PyTorch's is another

def test_constants_alone_lead_nowhere():
    y = where(torch.tensor(True), 1., 2.)
    with pytest.raises(ValueError, match='constants alone'): y.backward()
    frozen = Var(2.)
    frozen.requires_grad = False
    w = Var(3.)
    (frozen*w).backward()
    assert w.grad.item()==2 and frozen.grad is None

def test_first_gradient_may_be_a_number():
    for g in (2, 2., np.float64(2), torch.tensor(2, dtype=torch.float64), Var(2.)):
        v = Var(3.)
        (v*v).backward(g)
        assert v.grad.item()==12 and v.grad.dtype==torch.float32
    for bad in ('x', [1.]):
        with pytest.raises(TypeError, match='as_tensor'): Var(3.).backward(bad)

@pytest.mark.parametrize('name', ['gt', 'ge', 'lt', 'le', 'eq', 'ne'])
def test_comparisons_give_plain_tensors(name):
    op = getattr(operator, name)
    x,y = torch.tensor([1., 2., 3.]),torch.tensor([3., 2., 1.])
    for got in (op(Var(x), Var(y)), op(Var(x), y), op(x, Var(y))): assert type(got) is torch.Tensor and torch.equal(got, op(x, y))
    for number in (2, 2., np.float32(2)): assert torch.equal(op(Var(x), number), op(x, 2)) and torch.equal(op(number, Var(x)), op(2, x))

def test_equality_leaves_sets_and_dicts_alone():
    a,b = Var(1.),Var(1.)
    assert len({a, b, a})==2 and {a: 1, b: 2}[b]==2 and hash(a)==hash(a)
    assert (a==None) is False and (a!=None) is True and (a=='1') is False
    assert a in [None, 'x', a] and 5. not in [a]
    assert Var(2.) and not Var(0.)
    with pytest.raises(RuntimeError, match='ambiguous'): bool(Var(torch.ones(2)))
