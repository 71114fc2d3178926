"Convolutions of random sizes, BatchNorm beside PyTorch's, small networks in other processes and on other devices"
import copy, io, pickle, shutil, subprocess, sys

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from course_lib.conv import AdaptivePool, BatchNorm, ConvLayer, conv2d_unfold, im2col
from course_lib.core import test_near
from course_lib.dataloader import DataLoader, Dataset
from course_lib.module import Linear, Parameter, Sequential

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

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.booleans(), st.integers(5, 9))
def test_conv_layer_is_conv2d_then_batch_norm_then_relu(ni, nf, ks, stride, norm, size):
    x = torch.randn(3, ni, size, size+1)
    ours = ConvLayer(ni, nf, ks, stride, norm=norm)
    conv = torch.nn.Conv2d(ni, nf, ks, stride, padding=ks//2, bias=not norm)
    conv.load_state_dict({k: v for k,v in ours.state_dict().items() if not k.startswith('norm.')})
    bn = torch.nn.BatchNorm2d(nf) if norm else torch.nn.Identity()
    if norm: bn.load_state_dict({k.removeprefix('norm.'): v for k,v in ours.state_dict().items() if k.startswith('norm.')})
    test_near(ours(x), bn(conv(x)).relu(), eps=1e-5)
    assert ours(x).shape[2:]==(-(-size//stride), -(-(size+1)//stride))

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

@pytest.mark.parametrize('shape', [(1,3), (1,3,1), (1,3,1,1)])
def test_a_batch_of_one_value_names_drop_last_and_changes_nothing(shape):
    bn = BatchNorm(3)
    before = copy.deepcopy(bn.state_dict())
    with pytest.raises(ValueError, match=r'more than 1 value per channel.*drop_last=True'): bn(torch.randn(shape))
    for k,t in bn.state_dict().items(): test_near(t, before[k], eps=0)
    assert bn.eval()(torch.randn(shape)).shape==shape       # in use, one will do
    assert BatchNorm(3)(torch.randn(1,3,2,1)).shape==(1,3,2,1)

def test_the_last_batch_of_one_item():
    ds,net = Dataset(torch.randn(9,4), torch.zeros(9)),Sequential(Linear(4, 3), BatchNorm(3))
    with pytest.raises(ValueError, match='drop_last'):
        for xb,yb in DataLoader(ds, bs=4): net(xb)
    assert net[1].num_batches_tracked==2
    for xb,yb in DataLoader(ds, bs=4, drop_last=True): net(xb)

@pytest.mark.parametrize('n', [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_sizes_may_be_anybodys_whole_numbers(n):
    layer,x = ConvLayer(n, n, n, n, norm=True),torch.randn(2,3,7,7)
    assert layer.weight.shape==(3,3,3,3) and repr(layer).startswith('ConvLayer(3, 3, ks=3, stride=3)') and BatchNorm(n)(x).shape==x.shape
    test_near(conv2d_unfold(x, layer.weight, stride=n, padding=n), F.conv2d(x, layer.weight, stride=3, padding=3), eps=1e-5)

@pytest.mark.parametrize('make,says', [
    (lambda: ConvLayer(True, 2), 'ni is True'), (lambda: ConvLayer(1, 2.5), 'nf is 2.5'), (lambda: ConvLayer(1, 2, ks=0), 'ks is 0'),
    (lambda: ConvLayer(1, 2, stride='2'), "stride is '2'"), (lambda: BatchNorm(True), 'nf is True'), (lambda: BatchNorm(-1), 'nf is -1'),
    (lambda: BatchNorm(2, mom=float('nan')), 'mom is nan'), (lambda: BatchNorm(2, eps=-1), 'eps is -1'),
    (lambda: im2col(torch.zeros(1,1,3,3), (2,2), stride=True), 'stride is True'),
    (lambda: im2col(torch.zeros(1,1,3,3), (2,2), padding=-1), 'padding is -1')])
def test_sizes_that_are_none(make, says):
    with pytest.raises(ValueError, match=says): make()

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

@pytest.mark.parametrize('training', [False, True])
def test_compiler_sees_through_a_cnn(training):
    m,x = small_cnn().train(training),torch.randn(4,1,8,8)
    other = copy.deepcopy(m)
    torch.compiler.reset()
    for _ in range(2): test_near(torch.compile(m, backend='eager', fullgraph=True)(x), other(x), eps=1e-6)
    for k,t in m.state_dict().items(): test_near(t, other.state_dict()[k], eps=1e-6)

@pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++')), reason='needs a C++ compiler')
def test_the_default_compiler_takes_a_cnn():
    "Compiled to machine code, in training: outputs, gradients and running averages, over two steps"
    m,x = small_cnn(),torch.randn(4,1,8,8)
    other = copy.deepcopy(m)
    torch.compiler.reset()
    compiled = torch.compile(m, fullgraph=True)
    for _ in range(2):
        test_near(compiled(x), other(x), eps=1e-5)
        for net in (compiled, other): net(x).square().sum().backward()
    for p,q in zip(m.parameters(), other.parameters()): test_near(p.grad, q.grad, eps=1e-4, rel=1e-4)
    for k,t in m.state_dict().items(): test_near(t, other.state_dict()[k], eps=1e-5)
    assert m[0].norm.num_batches_tracked==4

def test_a_window_may_be_one_number_and_must_be_one():
    x = torch.randn(2,3,7,6)
    test_near(im2col(x, 3), im2col(x, (3,3)), eps=0)
    for ks in (0, (0,3), (-1,3), True):
        with pytest.raises(ValueError, match='im2col: ks is'): im2col(x, ks)

@pytest.mark.parametrize('shape', [(), (1,), (4,1), (20,4)])
def test_conv2d_unfold_refuses_a_bias_that_would_be_spread(shape):
    x,weight = torch.randn(2,3,7,6),torch.randn(4,3,3,3)        # 20 places
    with pytest.raises(ValueError, match=r'the bias is .*, but \(4,\) is needed'): conv2d_unfold(x, weight, torch.ones(shape))
    with pytest.raises(ValueError, match=r'the weight is .*, but \(nf, ni, kh, kw\)'): conv2d_unfold(x, weight[...,None])
