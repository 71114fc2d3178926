"Properties of the optimizers that the notebook only samples: any hyper-parameters, layouts, interruptions"
import inspect
import io
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from course_lib.optim import SGD, Adam, AdamW, BasicOptim, RMSProp

everyone = {'BasicOptim': partial(BasicOptim, lr=0.1),
            'SGD': partial(SGD, lr=0.1),
            'momentum': partial(SGD, lr=0.1, mom=0.9, wd=0.1),
            'RMSProp': partial(RMSProp, wd=0.1),
            'Adam': partial(Adam, lr=0.1, wd=0.1),
            'AdamW': partial(AdamW, lr=0.1)}
torchs = {'BasicOptim': partial(torch.optim.SGD, lr=0.1),
          'SGD': partial(torch.optim.SGD, lr=0.1),
          'momentum': partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
          'RMSProp': partial(torch.optim.RMSprop, weight_decay=0.1),
          'Adam': partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
          'AdamW': partial(torch.optim.AdamW, lr=0.1)}
each = pytest.mark.parametrize('name', everyone)
lrs = st.floats(1e-5, 0.3)
below_1 = st.one_of(st.just(0.), st.floats(0.01, 0.999))
wds = st.one_of(st.just(0.), st.floats(1e-5, 0.5))
epss = st.sampled_from([1e-8, 1e-6, 1e-3])
scales = st.sampled_from([1e-3, 1., 1e3])
seeds = st.integers(0, 10_000)
SHAPES = [(3, 4), (5,), (), (2, 3, 3, 3)]
few = settings(max_examples=25, deadline=None)

def make_params(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in SHAPES], g

def steps(opt, params, g, n=50, scale=1.):
    for _ in range(n):
        for p in params: p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)*scale
        opt.step()
    return params

def check_same(ours, theirs, seed, scale=1.):
    """Our two forms end where PyTorch's do after 50 steps: beside its like in float32, beside the plain loop in float64.
    (Adam with an L2 penalty can magnify a difference in the last bit: in float32 PyTorch's own forms differ by 1e-4)"""
    def run(make, dtype):
        params,g = make_params(seed, dtype)
        return steps(make(params), params, g, scale=scale)
    def readable(params):
        opt = ours(params)
        opt.fused = False
        return opt
    has_fused = ours(make_params(seed)[0]).fused
    pairs = [(readable, dict(foreach=True)), (ours, dict(fused=True) if has_fused else dict(foreach=True))]
    for dtype,eps in [(torch.float32,1e-6), (torch.float64,1e-9)]:
        for mine,form in pairs:
            if dtype==torch.float64: form = dict(foreach=False)
            for a,b in zip(run(mine, dtype), run(partial(theirs, **form), dtype)):
                assert (a-b).abs().max().item() <= eps*max(1., b.abs().max().item()), (mine, form, dtype)

@few
@given(lrs, below_1, wds, seeds)
def test_sgd_is_torchs(lr, mom, wd, seed):
    check_same(partial(SGD, lr=lr, mom=mom, wd=wd),
               partial(torch.optim.SGD, lr=lr, momentum=mom, weight_decay=wd), seed)

@few
@given(lrs, below_1, wds, epss, scales, seeds)
def test_rmsprop_is_torchs(lr, alpha, wd, eps, scale, seed):
    check_same(partial(RMSProp, lr=lr, alpha=alpha, eps=eps, wd=wd),
               partial(torch.optim.RMSprop, lr=lr, alpha=alpha, eps=eps, weight_decay=wd), seed, scale)

@few
@given(lrs, below_1, below_1, wds, epss, scales, seeds,
       st.sampled_from([(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]))
def test_adam_is_torchs(lr, b1, b2, wd, eps, scale, seed, classes):
    ours,theirs = classes
    check_same(partial(ours, lr=lr, betas=(b1,b2), eps=eps, wd=wd),
               partial(theirs, lr=lr, betas=(b1,b2), eps=eps, weight_decay=wd), seed, scale)

@each
def test_settings_may_change_between_steps(name):
    "As a schedule does it: a new lr before each step, and a new momentum"
    results = []
    for make in (everyone[name], torchs[name]):
        params,g = make_params(0)
        opt = make(params)
        for i in range(20):
            lr,mom = 0.1*(20-i)/20,0.5 + i/50
            if isinstance(opt, BasicOptim):
                opt.lr = lr
                if hasattr(opt, 'mom'): opt.mom = mom if name!='SGD' else 0.
            else:
                group = opt.param_groups[0]
                group['lr'] = lr
                if 'betas' in group: group['betas'] = (mom, group['betas'][1])
                elif name=='momentum': group['momentum'] = mom
            steps(opt, params, g, n=1)
        results.append(params)
    for a,b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@each
def test_parameters_without_gradient_are_left_out(name):
    "Parameters that have a gradient only now and then count their own steps"
    results = []
    for make in (everyone[name], torchs[name]):
        params,g = make_params(1)
        opt = make(params)
        for i in range(12):
            for j,p in enumerate(params): p.grad = torch.randn(p.shape, generator=g) if i%(j+1)==0 else None
            before = [p.detach().clone() for p in params]
            opt.step()
            assert all(torch.equal(p, b) for p,b in zip(params, before) if p.grad is None)
        results.append(params)
    for a,b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@each
def test_gradients_are_only_read(name):
    params,g = make_params(2)
    opt = everyone[name](params)
    steps(opt, params, g, n=1)
    grads = [p.grad.clone() for p in params]
    opt.step()
    assert all(torch.equal(p.grad, o) for p,o in zip(params, grads))
    opt.zero_grad()
    assert all(p.grad is None for p in params)

layouts = {'channels last': lambda x: x.to(memory_format=torch.channels_last),
           'with gaps': lambda x: x.repeat_interleave(2, -1)[...,::2],
           'transposed': lambda x: x.permute(3,2,1,0).contiguous().permute(3,2,1,0),
           'as usual': lambda x: x.contiguous()}

@each
@pytest.mark.parametrize('grad', layouts)
@pytest.mark.parametrize('param', layouts)
def test_any_memory_layout(name, param, grad):
    "A parameter and a gradient that lie in memory in different orders, and a parameter whose order changes in between"
    g = torch.Generator().manual_seed(3)
    x,grads = torch.randn(4,3,5,6, generator=g),torch.randn(6,4,3,5,6, generator=g)
    def run(param, grad):
        p = layouts[param](x.clone()).requires_grad_()
        opt = everyone[name]([p])
        for i,o in enumerate(grads):
            if i==3: p.data = layouts['channels last'](p.data.clone()) if param!='as usual' else p.data
            p.grad = layouts[grad](o.clone())
            opt.step()
        return p.detach()
    torch.testing.assert_close(run(param, grad), run('as usual', 'as usual'), rtol=1e-5, atol=1e-6)

@each
def test_several_types_at_once(name):
    "float64, float32 and bfloat16 parameters in one optimizer, each as if it were alone"
    def run(dtypes):
        params = [torch.linspace(-1, 1, 12, dtype=d).requires_grad_() for d in dtypes]
        opt = everyone[name](params)
        for i in range(5):
            for p in params: p.grad = (p.detach()*(i+1)).sin()
            opt.step()
        return params
    types = [torch.float64, torch.float32, torch.bfloat16]
    for d,p in zip(types, run(types)):
        assert p.dtype==d and p.isfinite().all()
        assert torch.equal(p, run([d])[0])

@each
def test_any_number_of_threads_gives_the_same_bits(name):
    def run(n):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            g = torch.Generator().manual_seed(4)
            p = torch.randn(100_003, generator=g).requires_grad_()
            return steps(everyone[name]([p]), [p], g, n=3)[0]
        finally: torch.set_num_threads(before)
    assert torch.equal(run(1), run(2))

@few
@given(st.sampled_from(sorted(everyone)), st.integers(0, 8), st.integers(1, 8), seeds)
def test_resuming_from_a_file_is_exact(name, before, after, seed):
    "Numbers as JSON and tensors in a file, then a new optimizer on copies of the parameters: the same bits"
    params,g = make_params(seed)
    opt = everyone[name](params)
    steps(opt, params, g, n=before)
    saved,file = opt.state_dict(),io.BytesIO()
    torch.save(saved.pop('state'), file)
    text = json.dumps(saved)
    copies = [p.detach().clone().requires_grad_() for p in params]
    g2 = torch.Generator()
    g2.set_state(g.get_state())
    steps(opt, params, g, n=after)
    file.seek(0)
    again = everyone[name](copies)
    again.lr = 0.7      # will be overwritten
    again.load_state_dict({**json.loads(text), 'state': torch.load(file, weights_only=True)})
    steps(again, copies, g2, n=after)
    assert all(torch.equal(a, b) for a,b in zip(params, copies))
    a,b = opt.state_dict(),again.state_dict()
    assert a['state'].keys()==b['state'].keys() and all(torch.equal(a['state'][k], b['state'][k]) for k in a['state'])
    assert json.dumps(a['hypers'])==json.dumps(b['hypers'])

def corruptions(saved):
    "Ways to spoil a state of AdamW, each with a part of the error it must give"
    state = saved['state']
    def with_state(**changes): return {**saved, 'state': {**state, **changes}}
    yield {k:v for k,v in saved.items() if k!='shapes'}, "KeyError('shapes')"
    yield {}, 'must come from state_dict'
    yield {**saved, 'optimizer': 'Adam'}, 'class is Adam in the state, but AdamW'
    yield {**saved, 'hypers': {**saved['hypers'], 'mom': 0.9}}, 'mom'
    yield {**saved, 'hypers': {**saved['hypers'], 'lr': float('nan')}}, 'lr is nan'
    yield {**saved, 'hypers': {**saved['hypers'], 'betas': [0.9]}}, 'two numbers'
    yield {**saved, 'shapes': saved['shapes'][:-1]}, 'parameters is 3 in the state, but 4'
    yield {**saved, 'shapes': [[4,3], *saved['shapes'][1:]]}, 'parameter 0 is (4, 3) in the state, but (3, 4)'
    yield with_state(**{'1.avg': torch.zeros(6)}), '1.avg is (6,) in the state, but (5,)'
    yield with_state(**{'1.t': torch.zeros(1)}), '1.t is (1,) in the state, but ()'
    yield with_state(**{'4.avg': torch.zeros(5)}), '4.avg'
    yield with_state(velocity=torch.zeros(5)), 'velocity'
    yield {**saved, 'state': {k:v for k,v in state.items() if k!='2.sqr'}}, '2.sqr is None in the state, but ()'

def test_a_state_that_does_not_fit_changes_nothing():
    params,g = make_params(5)
    other = AdamW(params, lr=0.2, betas=(0.5,0.6))
    steps(other, params, g, n=3)
    bad = list(corruptions(other.state_dict()))
    assert len(bad)==13
    for saved,says in bad:
        params,g = make_params(6)
        opt = AdamW(params)
        steps(opt, params, g, n=2)
        before = opt.state_dict()
        with pytest.raises(ValueError) as e: opt.load_state_dict(saved)
        assert says in str(e.value) and 'AdamW.load_state_dict' in str(e.value)
        after = opt.state_dict()
        assert after['hypers']==before['hypers']
        assert after['state'].keys()==before['state'].keys()
        assert all(torch.equal(after['state'][k], before['state'][k]) for k in after['state'])

junk = [None, True, 3, -1., float('nan'), 'x', [], [1.], {}, torch.ones(7), torch.zeros(()), np.ones(2), object()]

@each
def test_a_damaged_state_is_refused_and_changes_nothing(name):
    "Each part of a state replaced by something else: a ValueError, and the optimizer is as it was; or it loads"
    params,g = make_params(8)
    opt = everyone[name](params)
    steps(opt, params, g, n=2)
    good = opt.state_dict()
    def damaged():
        for bad in junk:
            if not isinstance(bad, torch.Tensor): yield bad
            for key in good: yield {**good, key: bad}
            for key in good['hypers']: yield {**good, 'hypers': {**good['hypers'], key: bad}}
            for key in [*good['state'], 3, '0', '9.avg', '0.velocity.x']: yield {**good, 'state': {**good['state'], key: bad}}
    refused = 0
    for saved in damaged():
        before = str(opt.state_dict())
        try: opt.load_state_dict(saved)
        except ValueError:
            refused += 1
            assert str(opt.state_dict())==before
        opt.load_state_dict(good)
    assert refused > 100

@each
def test_a_model_may_move_after_its_first_steps(name):
    "To 64 bits, all of it or a part: the same bits as a new optimizer with the loaded state, and what PyTorch's does"
    def trained(make):
        params,g = make_params(9)
        opt = make(params)
        return steps(opt, params, g, n=3),opt
    def go_on(opt, params): return steps(opt, params, torch.Generator().manual_seed(1), n=3)
    def restarted(make, opt, params):
        copies = [p.detach().clone().requires_grad_() for p in params]
        again = make(copies)
        again.load_state_dict(opt.state_dict())
        return go_on(again, copies)
    for moved in (range(4), [1], [0,2]):
        params,opt = trained(everyone[name])
        for i in moved: params[i].data = params[i].data.double()
        wanted = restarted(everyone[name], opt, params)
        assert all(torch.equal(a, b) for a,b in zip(go_on(opt, params), wanted))
        for i,(p,s) in enumerate(zip(params, opt.state)):
            assert p.dtype==(torch.float64 if i in moved else torch.float32)
            assert all(t.dtype==(torch.float32 if key=='t' else p.dtype) for key,t in s.items())
        theirs,their_opt = trained(torchs[name])
        wanted = restarted(torchs[name], their_opt, [p.detach().to(q.dtype) for p,q in zip(theirs, params)])
        for a,b in zip(params, wanted): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@each
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_a_state_may_come_from_another_type(name, dtype):
    params,g = make_params(10, torch.float32)
    opt = everyone[name](params)
    steps(opt, params, g, n=2)
    copies = [p.detach().to(dtype).requires_grad_() for p in params]
    again = everyone[name](copies)
    again.load_state_dict(opt.state_dict())
    for s,saved in zip(again.state, opt.state):
        for key,t in s.items(): assert t.dtype==(torch.float32 if key=='t' else dtype) and torch.equal(t, saved[key].to(t.dtype))
    steps(again, copies, g, n=1)
    assert all(p.dtype==dtype and p.isfinite().all() for p in copies)

@each
def test_frozen_parameters_stay_and_a_list_of_nothing_else_is_refused(name):
    a,b = torch.ones(2, requires_grad=True),torch.ones(2)
    opt = everyone[name]([b, a])
    (a*b).sum().backward()
    opt.step()
    assert b.tolist()==[1., 1.] and a.tolist()!=[1., 1.]
    a.requires_grad_(False)
    opt.load_state_dict(opt.state_dict())       # all frozen by now, and still itself
    b.requires_grad_()
    (a*b).sum().backward()
    opt.step()
    assert b.tolist()!=[1., 1.]
    for frozen in ([torch.ones(2)], nn.Linear(2,1).requires_grad_(False).parameters()):
        with pytest.raises(ValueError, match=r'(SGD|BasicOptim|RMSProp|Adam|AdamW): none .* requires_grad_\(\)'): everyone[name](frozen)

@pytest.mark.parametrize('bad,says', [(nn.Linear(2,1), 'Linear.*model.parameters'), (nn.Sequential(nn.Linear(2,1)), 'parameter 0 is a Linear'),
    (torch.ones(2), 'brackets'), (None, 'NoneType'), (3, 'int'), (nn.Linear(2,1).state_dict(), 'parameter 0 is a str'), ([{'params': []}], 'parameter 0 is a dict')])
def test_what_is_no_list_of_parameters(bad, says):
    with pytest.raises(ValueError, match=f'SGD: .*{says}'): SGD(bad, lr=0.1)

@each
def test_complex_parameters_are_refused(name):
    "The square of a complex gradient is not the square of its size, so RMSProp and Adam would go astray without a word"
    real,both = torch.ones(2, requires_grad=True),torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match='parameter 1 holds complex numbers.*two parameters'): everyone[name]([real, both])

numbers = [np.float64(0.25), np.float32(0.25), torch.tensor(0.25), np.array(0.25)]

@each
@pytest.mark.parametrize('value', numbers, ids=lambda v: type(v).__name__)
def test_numbers_are_numbers(name, value):
    "NumPy's and one-number tensors are taken, now and between steps, and states hold Python's own"
    make = everyone[name]
    kwargs = {k: value for k in ('lr', 'wd', 'eps', 'mom', 'alpha') if k in inspect.signature(make.func).parameters}
    if 'betas' in inspect.signature(make.func).parameters: kwargs['betas'] = [value, value]
    results = []
    for convert in (lambda v: v, lambda v: [0.25]*2 if isinstance(v, list) else 0.25):
        params,g = make_params(11)
        opt = make.func(params, **{k: convert(v) for k,v in kwargs.items()})
        assert all(type(o) is float or o==(0.25, 0.25) for o in (getattr(opt, h) for h in opt.hypers))
        steps(opt, params, g, n=2)
        results.append(params)
    assert all(torch.equal(a, b) for a,b in zip(*results))
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        opt.lr = value
        if hasattr(opt, 'mom'): opt.mom = value
        steps(opt, params, g, n=1)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    json.dumps(torch.load(file, weights_only=True)['hypers'])

@pytest.mark.parametrize('bad', [True, np.bool_(True), '0.1', None, float('nan'), float('inf'), -0.1, 1j, [0.1], torch.ones(2)])
def test_what_is_no_number(bad):
    w = torch.ones(1, requires_grad=True)
    for name,make in {'lr': lambda: SGD([w], lr=bad), 'mom': lambda: SGD([w], lr=1, mom=bad), 'wd': lambda: AdamW([w], wd=bad),
                      'alpha': lambda: RMSProp([w], alpha=bad), 'eps': lambda: Adam([w], eps=bad), r'betas\[1\]': lambda: Adam([w], betas=(0.9, bad))}.items():
        with pytest.raises(ValueError, match=f'(SGD|AdamW|RMSProp|Adam): {name} is '): make()
    for betas in (0.9, (0.9,), (0.9, 0.9, 0.9), 'ab', None):
        with pytest.raises(ValueError, match='two numbers'): Adam([w], betas=betas)
    opt = SGD([w], lr=0.1)
    opt.lr = bad
    with pytest.raises(ValueError, match='SGD.state_dict: lr is '): opt.state_dict()

@each
def test_a_loaded_state_is_a_copy(name):
    "Neither the saved state nor the optimizer it came from feels the steps of the one that loaded it"
    params,g = make_params(7)
    opt = everyone[name](params)
    steps(opt, params, g, n=2)
    saved = opt.state_dict()
    before = {k:t.clone() for k,t in saved['state'].items()}
    again = everyone[name]([p.detach().clone().requires_grad_() for p in params])
    again.load_state_dict(saved)
    steps(again, again.params, g, n=2)
    for now in (saved['state'], opt.state_dict()['state']):
        assert all(torch.equal(now[k], t) for k,t in before.items())

@each
def test_parameters_as_they_come(name):
    "A generator, a list and a tuple; and other kinds of Parameter than PyTorch's own"
    class Param(torch.Tensor): __torch_function__ = torch._C._disabled_torch_function_impl
    net = nn.Sequential(nn.Linear(3,2), nn.Linear(2,1))
    for params in (net.parameters(), list(net.parameters()), tuple(net.parameters())):
        assert len(everyone[name](params).params)==4
    ours = torch.ones(3).as_subclass(Param).requires_grad_()
    plain = torch.ones(3, requires_grad=True)
    for p in (ours, plain):
        opt = everyone[name]([p])
        for _ in range(3):
            (p**2).sum().backward()
            opt.step()
            opt.zero_grad()
        for s in opt.state:
            for t in s.values(): assert type(t) is torch.Tensor and not t.requires_grad
    assert isinstance(ours, Param) and torch.equal(ours.as_subclass(torch.Tensor), plain)

def test_stands_alone():
    "Importing optim imports only core of the course, and not matplotlib"
    code = "import sys, course_lib.optim; print(*sys.modules)"
    names = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert [o for o in names if o.startswith('course_lib.')]==['course_lib.core', 'course_lib.optim']
    assert not {'matplotlib', 'pandas', 'fastai'} & set(names)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@each
def test_on_a_gpu(name):
    "The same as on the CPU, also if the model is moved after the optimizer was made; a state may change devices"
    grads = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(8))
    def run(devices, fused=True, load=True):
        net = nn.Linear(3, 4, bias=False)
        with torch.no_grad(): net.weight.copy_(torch.arange(12.).view(4,3)/6 - 1)
        opt = everyone[name](net.parameters())
        for g,device in zip(grads, devices):
            if net.weight.device.type != device:
                saved = opt.state_dict()
                net.to(device)
                if load: opt.load_state_dict(saved)
            if not fused: opt.fused = False
            net.weight.grad = g.to(device)
            opt.step()
        return net.weight.detach().cpu()
    wanted = run(['cpu']*10)
    there,back = ['cpu']*5 + ['cuda']*5,['cuda']*5 + ['cpu']*5
    for o in (run(['cuda']*10), run(['cuda']*10, fused=False), run(there), run(back), run(there, load=False), run(back, load=False)):
        torch.testing.assert_close(o, wanted, rtol=1e-5, atol=1e-6)
