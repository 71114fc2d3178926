"What 06_mlp promises about numbers and types, beyond the examples in its cells"
import numpy as np
import pytest
import torch

from course_lib.autograd import Var
from course_lib.mlp import MLP, init_layer, init_net, relu

@pytest.mark.parametrize('kind', [np.int64, np.int32, np.uint8, torch.tensor, np.array], ids=lambda k: k.__name__)
def test_sizes_may_be_any_whole_numbers(kind):
    net = MLP(kind(5), kind(4), 1)
    assert net.sizes==(5, 4, 1) and all(type(n) is int for n in net.sizes)
    assert repr(net)==repr(MLP(5, 4, 1)) and net(torch.randn(3, 5)).shape==(3, 1)
    assert [p.shape for p in init_net(kind(5), kind(4), kind(1))]==[p.shape for p in net.parameters()]

@pytest.mark.parametrize('bad', [True, np.bool_(True), 0, -3, 2.5, '3', None, [5, 4], (5,), torch.ones(2, dtype=torch.int64)])
def test_what_is_no_size_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r'MLP: sizes\[1\] is .*whole number of at least 1'): MLP(5, bad, 1)
    for name,sizes in (('ni', (bad, 3)), ('no', (3, bad))):
        with pytest.raises(ValueError, match=f'init_layer: {name} is .*whole number of at least 1'): init_layer(*sizes)

@pytest.mark.parametrize('bad', [True, -0.1, float('nan'), float('inf'), '1', [0.1]])
def test_what_is_no_standard_deviation_is_refused(bad):
    for make in (lambda: init_layer(3, 2, bad), lambda: MLP(3, 2, std=bad)):
        with pytest.raises(ValueError, match='init_layer: std is'): make()

def test_std():
    for std in (0, 0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        torch.manual_seed(0)
        w,b = init_layer(200, 200, std)
        assert w.dtype==b.dtype==torch.float32 and w.requires_grad and abs(w.std().item() - float(std)) < 0.01

@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_relu_keeps_the_type(dtype):
    for values in ([-3, 0, 3], [], [[0, 1], [2, 3]]):
        x = torch.tensor(values).to(dtype)
        assert relu(x).dtype==dtype and torch.equal(relu(x), torch.relu(x))
    if dtype.is_floating_point:
        x = torch.randn(50).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        relu(x).sum().backward(); torch.relu(y).sum().backward()
        assert x.grad.dtype==dtype and torch.equal(x.grad, y.grad)

def test_relu_of_a_var():
    v = Var(torch.tensor([-1., 0., 2.]))
    relu(v).sum().backward()
    assert v.grad.tolist()==[0., 0., 1.] and relu(v).data.tolist()==[0., 0., 2.]
