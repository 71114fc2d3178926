"Modules of random shape, convolutions of random sizes, other processes and devices: what the chapter cannot show"
import copy, io, pickle, subprocess, sys

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from course_lib.core import test_near
from course_lib.conv import AdaptivePool, BatchNorm, ConvLayer, conv2d_unfold, im2col
from course_lib.module import Buffer, Linear, Module, Parameter, ReLU, Sequential

@st.composite
def convolutions(draw):
    "(x, weight, bias, stride, padding) that fit"
    n = lambda lo,hi: draw(st.integers(lo, hi))
    bs,ni,nf,kh,kw,stride,padding = n(1,3),n(1,3),n(1,4),n(1,4),n(1,4),n(1,4),n(0,3)
    h,w = n(max(1, kh-2*padding), 9),n(max(1, kw-2*padding), 9)
    torch.manual_seed(n(0, 2**16))
    shapes = [(bs,ni,h,w), (nf,ni,kh,kw)] + [(nf,)]*n(0,1)
    args = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]
    return args,stride,padding

@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_conv2d_unfold_is_conv2d(case):
    args,stride,padding = case
    ours = conv2d_unfold(*args, stride=stride, padding=padding)
    theirs = F.conv2d(*args, stride=stride, padding=padding)
    test_near(ours, theirs, eps=1e-10)
    up = torch.randn_like(ours)
    for g,h in zip(torch.autograd.grad(ours, args, up), torch.autograd.grad(theirs, args, up)): test_near(g, h, eps=1e-9)
    x,weight = args[:2]
    test_near(im2col(x, weight.shape[2:], stride, padding), F.unfold(x, weight.shape[2:], stride=stride, padding=padding).mT, eps=0)

class Tree(Module):
    "A module with children and tensors given by name"
    def __init__(self, parts):
        for i,part in enumerate(parts): setattr(self, f'part{i}', part)

@st.composite
def trees(draw):
    "A tree of modules in which tensors and modules may be used in several places"
    tensor = st.tuples(st.sampled_from([Parameter, Buffer]), st.integers(0, 3)).map(lambda o: o[0](torch.randn(o[1])))
    parts = draw(st.lists(tensor, min_size=1, max_size=5))
    for _ in range(draw(st.integers(0, 5))): parts.append(Tree(draw(st.lists(st.sampled_from(parts), max_size=4))))
    return Tree(parts)

def torch_twin(m, made):
    "The same tree of torch.nn modules, around the same tensors"
    if id(m) in made: return made[id(m)]
    made[id(m)] = twin = torch.nn.Module()
    for name,v in vars(m).items():
        if isinstance(v, Module): twin.add_module(name, torch_twin(v, made))
        elif isinstance(v, Parameter): twin.register_parameter(name, v)
        elif isinstance(v, Buffer): twin.register_buffer(name, v)
    return twin

@settings(max_examples=100, deadline=None)
@given(trees())
def test_lists_what_torch_nn_lists(m):
    twin = torch_twin(m, {})
    assert {id(p) for p in m.parameters()}=={id(p) for p in twin.parameters()}
    assert {id(b) for b in m.buffers()}=={id(b) for b in twin.buffers()}
    for ours in ([id(p) for p in m.parameters()], [id(b) for b in m.buffers()], [id(o) for o in m.modules()]):
        assert len(ours)==len(set(ours))
    assert len(list(m.modules()))==len(list(twin.modules()))
    assert set(m.state_dict())==set(twin.state_dict())

@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_load_all_or_nothing(m, data):
    state = {k: t + 1 for k,t in m.state_dict().items()}
    before = copy.deepcopy(m.state_dict())
    key = data.draw(st.sampled_from(sorted(state)))
    broken = dict(state)
    kind = data.draw(st.sampled_from(['missing', 'unexpected', 'shape']))
    if kind=='missing': del broken[key]
    elif kind=='unexpected': broken['nobody.knows'] = torch.zeros(1)
    else: broken[key] = torch.zeros(17)
    with pytest.raises(ValueError, match=f'{kind}: .*{"nobody" if kind=="unexpected" else key}'): m.load_state_dict(broken)
    for k,t in m.state_dict().items(): test_near(t, before[k], eps=0)
    m.load_state_dict(state)
    for k,t in m.state_dict().items(): test_near(t, before[k] + 1, eps=1e-6)

@settings(max_examples=50, deadline=None)
@given(trees())
def test_copies_are_independent_and_keep_ties(m):
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert [k for k,p in copied.named_parameters()]==[k for k,p in m.named_parameters()]
        assert len(list(copied.modules()))==len(list(m.modules()))
        assert not {id(t) for t in [*copied.parameters(), *copied.buffers()]} & {id(t) for t in [*m.parameters(), *m.buffers()]}
        for k,t in m.state_dict().items():
            test_near(copied.state_dict()[k], t, eps=0)
            assert not t.numel() or copied.state_dict()[k].data_ptr()!=t.data_ptr()

def small_cnn(): return Sequential(ConvLayer(1, 4, stride=2, norm=True), ConvLayer(4, 8, norm=True), AdaptivePool(), Linear(8, 2))

READ = """
import pickle, sys, torch
m = pickle.load(sys.stdin.buffer)
print(type(m[0].weight).__module__, m.training, len(list(m.parameters())), m(torch.ones(2,1,8,8)).tolist())
"""

def test_pickle_into_a_new_process():
    m = small_cnn().eval()
    m[0].register_forward_hook(lambda *args: None)      # a function that pickle would refuse
    out = subprocess.run([sys.executable, '-c', READ], input=pickle.dumps(m), capture_output=True, check=True).stdout.decode()
    assert out.split(' ', 3)[:3]==['course_lib.module', 'False', '8']
    test_near(torch.tensor(eval(out.split(' ', 3)[3])), m(torch.ones(2,1,8,8)), eps=1e-6)

def test_torch_save_of_plain_tensors():
    m,file = small_cnn(),io.BytesIO()
    m(torch.randn(4,1,8,8))
    torch.save(m.state_dict(), file)
    file.seek(0)
    other = small_cnn().load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4,1,8,8)
    test_near(other.eval()(x), m.eval()(x), eps=0)
    assert other[0].norm.num_batches_tracked==1

def test_batchnorm_states_both_ways():
    ours,theirs = BatchNorm(3),torch.nn.BatchNorm2d(3)
    theirs(torch.randn(4,3,5,5))
    ours.load_state_dict(theirs.state_dict())
    ours(torch.randn(4,3,5,5))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.num_batches_tracked==2
    x = torch.randn(2,3,4,4)
    test_near(ours.eval()(x), theirs.eval()(x), eps=1e-6)

@pytest.mark.parametrize('opt', [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize('foreach', [False, True])
def test_torch_optimizers_step_parameters(opt, foreach):
    torch.manual_seed(0)
    ours,theirs = Sequential(Linear(4, 3), ReLU(), Linear(3, 1)),torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8,4)
    for net in (ours, theirs):
        o = opt(net.parameters(), lr=0.01, foreach=foreach)
        for _ in range(5): o.zero_grad(); net(x).pow(2).mean().backward(); o.step()
    for p,q in zip(ours.parameters(), theirs.parameters()): test_near(p, q, eps=1e-6)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_to_cuda_keeps_the_parameters():
    m = small_cnn()
    before = [id(t) for t in [*m.parameters(), *m.buffers()]]
    opt = torch.optim.SGD(m.parameters(), lr=0.1)
    m.to('cuda')
    assert [id(t) for t in [*m.parameters(), *m.buffers()]]==before
    w = m[0].weight.detach().clone()
    m(torch.randn(4,1,8,8, device='cuda')).sum().backward()
    opt.step()
    assert w.is_cuda and not torch.equal(w, m[0].weight)
    m.to('cpu')
    assert m[0].weight.grad.device.type=='cpu' and type(m[0].weight) is Parameter

def test_compiler_sees_through():
    m,x = small_cnn(),torch.randn(4,1,8,8)
    m.eval()
    test_near(torch.compile(m, backend='eager', fullgraph=True)(x), m(x), eps=1e-6)

def test_hook_that_removes_itself():
    m,seen = Linear(2, 2),[]
    def once(module, inputs, output):
        seen.append(output)
        handle.remove()
    handle = m.register_forward_hook(once)
    for _ in range(3): m(torch.ones(1,2))
    assert len(seen)==1

def test_errors_keep_their_type_and_name_the_layers():
    m = Sequential(Linear(4, 3), Sequential(ReLU(), Linear(5, 1)))
    with pytest.raises(RuntimeError, match='cannot be multiplied') as e: m(torch.ones(2,4))
    assert e.value.__notes__==['in Linear(5, 1), called with (2, 3)', 'in Sequential(), called with (2, 3)', 'in Sequential(), called with (2, 4)']
