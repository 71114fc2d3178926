"Modules of random shape, states that do not fit, other libraries' tools: what the chapter cannot show"
import copy, pickle
from collections import OrderedDict, UserDict, UserList, deque, namedtuple

import numpy as np, pytest, torch
from fastcore.foundation import L
from hypothesis import given, settings, strategies as st

from course_lib.core import test_near
from course_lib.module import Buffer, Flatten, Linear, Module, Parameter, ReLU, Sequential, kaiming_normal_, xavier_normal_

class Tree(Module):
    "A module with children and tensors given by name"
    def __init__(self, parts):
        for i,part in enumerate(parts): setattr(self, f'part{i}', part)

class Holds(Module):
    "A module with whatever attributes it is given"
    def __init__(self, **kwargs):
        for k,v in kwargs.items(): setattr(self, k, v)

tensors = st.tuples(st.sampled_from([Parameter, Buffer]), st.integers(0, 3)).map(lambda o: o[0](torch.randn(o[1])))

@st.composite
def trees(draw):
    "A tree of modules in which tensors and modules may be used in several places"
    parts = draw(st.lists(tensors, min_size=1, max_size=5))
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

def ids(named): return [(path, id(o)) for path,o in named]

@settings(max_examples=100, deadline=None)
@given(trees())
def test_lists_what_torch_nn_lists(m):
    "The same names, in the same order"
    twin = torch_twin(m, {})
    assert ids(m.named_parameters())==ids(twin.named_parameters())
    assert ids(m.named_buffers())==ids(twin.named_buffers())
    assert [path for path,_ in m.named_modules()]==[path for path,_ in twin.named_modules()]
    assert ids(m.named_parameters(recurse=False))==ids(twin.named_parameters(recurse=False))
    assert set(m.state_dict())==set(twin.state_dict())

# ---- containers ----

Pair = namedtuple('Pair', 'a b')
leaves = st.one_of(tensors, st.builds(lambda: Linear(2, 1)), st.builds(ReLU), st.just(3), st.just('text'), st.none(), st.just(torch.ones(2)))
nested = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.lists(inner, max_size=3).map(deque),
    st.lists(inner, max_size=3).map(L), st.lists(inner, max_size=3).map(UserList), st.dictionaries(st.sampled_from('xyz'), inner, max_size=3).map(UserDict),
    st.tuples(inner, inner).map(lambda o: Pair(*o)), st.dictionaries(st.sampled_from('xyz'), inner, max_size=3),
    st.dictionaries(st.integers(0, 9), inner, max_size=3).map(OrderedDict), st.builds(lambda o: Holds(inside=o), inner)), max_leaves=12)

def parts_of(v):
    "All Parameters and Buffers in `v`, by brute force"
    if isinstance(v, (Parameter, Buffer)): yield v
    inside = vars(v).values() if isinstance(v, Module) else v.values() if isinstance(v, (dict,UserDict)) else v if isinstance(v, (list,tuple,deque,UserList,L)) else ()
    for o in inside: yield from parts_of(o)

def follow(m, path):
    "What stands at `path` in `m`"
    for name in path.split('.'):
        if isinstance(m, Module): m = vars(m)[name]
        elif isinstance(m, (dict,UserDict)): m = next(o for k,o in m.items() if str(k)==name)
        else: m = m[int(name)]
    return m

@settings(max_examples=200, deadline=None)
@given(st.lists(nested, max_size=4))
def test_whatever_stands_in_containers_is_found_trained_saved_and_moved(values):
    m = Holds(**{f'v{i}': v for i,v in enumerate(values)})
    listed = [*m.parameters(), *m.buffers()]
    assert {id(t) for t in parts_of(m)}=={id(t) for t in listed} and len(listed)==len({id(t) for t in listed})
    for path,o in [*m.named_parameters(), *m.named_buffers(), *m.named_children()]: assert follow(m, path) is o
    assert {follow(m, k).data_ptr() for k in m.state_dict()}=={t.data_ptr() for t in listed}
    assert all(not o.training for o in m.eval().modules())
    assert {t.dtype for t in m.to(torch.float64).state_dict().values()} <= {torch.float64}
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in m.parameters(): p.add_(1)
    other.load_state_dict(m.state_dict())
    for k,t in m.state_dict().items(): test_near(other.state_dict()[k], t, eps=0)

def paths(m): return [path for path,_ in m.named_parameters()]

def test_what_is_known_by_an_attribute_is_not_listed_again():
    a,b = Linear(2, 2, bias=False),Linear(2, 2, bias=False)
    for m in [Holds(a=a, b=b, order=[a, b]), Holds(order=[a, b], a=a, b=b), Holds(order={'a': [a], 'b': (b, b)}, a=a, b=b), Holds(a=a, b=b, order={a, b})]:
        assert paths(m)==list(m.state_dict())==['a.weight', 'b.weight']
        assert [name for name,_ in m.named_children()]==['a', 'b']
    net = Holds(body=Sequential(a, ReLU(), b))
    net.taps = [net.body[0], net.body[2].weight]                # parts of a part
    assert paths(net)==list(net.state_dict())==['body.0.weight', 'body.2.weight']
    net = Holds(blocks=[[a, ('b', b)]], heads=[b, a.weight])    # first come in a list, first named
    assert paths(net)==list(net.state_dict())==['blocks.0.0.weight', 'blocks.0.1.1.weight']

def test_containers_may_change():
    m = Holds(layers=[])
    assert paths(m)==[]
    m.layers += [Linear(2, 2), {'last': Linear(2, 1, bias=False)}]
    assert paths(m)==['layers.0.weight', 'layers.0.bias', 'layers.1.last.weight']
    del m.layers[0]
    assert paths(m)==['layers.0.last.weight']

def test_own_parameters_in_containers_are_found_without_recurse():
    m = Holds(ws=[Parameter(torch.ones(1))], layers=[Linear(1, 1)])
    assert [path for path,_ in m.named_parameters(recurse=False)]==['ws.0']
    for mod_path,mod in m.named_modules(): assert all('.' not in path or path=='ws.0' for path,_ in mod.named_parameters(recurse=False))

def cyclic():
    loop = [Linear(1, 1)]
    loop.append(loop)
    return loop

@pytest.mark.parametrize('value,error,says', [
    (lambda: {Linear(1, 1)}, TypeError, 'Holds.v.0 is in a set'), (lambda: [frozenset([('a', Linear(1, 1))])], TypeError, 'is in a set'),
    (lambda: [torch.nn.Linear(1, 1)], TypeError, "Holds.v.0: got torch.nn's Linear"), (lambda: {'a': ([torch.nn.ReLU()],)}, TypeError, r"Holds.v.a.0.0: got torch.nn's ReLU"),
    (lambda: [torch.nn.ModuleList([torch.nn.Linear(1, 1)])], TypeError, "torch.nn's ModuleList"), (lambda: torch.nn.ParameterList([torch.ones(1)]), TypeError, "Holds.v: got torch.nn's ParameterList"),
    (lambda: L(torch.nn.ReLU()), TypeError, "Holds.v.0: got torch.nn's ReLU"), (lambda: UserDict(a={Linear(1, 1)}), TypeError, 'Holds.v.a.0 is in a set'),
    (lambda: [torch.ones(1, requires_grad=True)], TypeError, 'Holds.v.0 is a plain tensor that asks for gradients'), (cyclic, ValueError, 'contains itself'),
    (lambda: {'a.0': Linear(1, 1), 'a': [Linear(1, 1)]}, ValueError, "two parts have the path 'v.a.0'"), (lambda: {1: ReLU(), '1': ReLU()}, ValueError, 'two parts')])
@pytest.mark.parametrize('ask', [lambda m: m.parameters(), lambda m: m.state_dict(), lambda m: m.to(torch.float64), lambda m: m.train(), lambda m: repr(m)])
def test_what_cannot_be_taken_is_refused_by_name(value, error, says, ask):
    with pytest.raises(error, match=says): ask(Holds(v=value()))

@pytest.mark.parametrize('put', [lambda m,o: setattr(o, 'me', m), lambda m,o: setattr(o, 'above', [m]), lambda m,o: setattr(m, 'all', [m]),
                                 lambda m,o: setattr(o, 'x', {'y': (o,)}), lambda m,o: o.append(m)])
def test_a_module_that_contains_itself_is_refused(put):
    m = Holds(o=Sequential(Linear(1, 1)))
    put(m, m.o)
    with pytest.raises(ValueError, match='contains itself'): m.parameters()

def test_what_is_no_part_is_let_be():
    m = Holds(numbers=[0.5]*10_000, words={'a': 'b'}, mask=torch.ones(3), kept=Linear(1, 1)(torch.ones(1,1)), lin=Linear(1, 1))
    m.register_forward_hook(Linear(5, 5))        # a module may be a hook; it is still no part
    assert paths(m)==['lin.weight', 'lin.bias'] and set(m.state_dict())=={'lin.weight', 'lin.bias'}

# ---- torch.nn's Parameter and Buffer ----

def with_torch_parts():
    return Holds(w=torch.nn.Parameter(torch.ones(2)), ws=[torch.nn.Parameter(torch.ones(3))], b=torch.nn.Buffer(torch.zeros(1)),
                 c=torch.nn.Buffer(torch.zeros(1), persistent=False))

def test_torch_parameters_and_buffers_are_taken():
    m = with_torch_parts()
    assert paths(m)==['w', 'ws.0'] and [path for path,_ in m.named_buffers()]==['b', 'c'] and list(m.state_dict())==['w', 'b', 'ws.0']
    before = [*m.parameters(), *m.buffers()]
    m.to(torch.float64)
    assert all(p is q and q.dtype==torch.float64 for p,q in zip(before, [*m.parameters(), *m.buffers()]))
    for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert paths(c)==paths(m) and list(c.state_dict())==list(m.state_dict()) and [path for path,_ in c.named_buffers()]==['b', 'c']
    m.b,m.c = torch.ones(1),torch.ones(1)                       # a plain tensor takes a buffer's place, and is one
    assert [path for path,_ in m.named_buffers()]==['b', 'c'] and list(m.state_dict())==['w', 'b', 'ws.0']
    with pytest.raises(TypeError, match='Holds.w is a Parameter'): m.w = torch.ones(2)
    sum(p.sum() for p in m.parameters()).backward()
    torch.optim.SGD(m.parameters(), lr=1.).step()
    test_near(m.w, torch.zeros(2))

# ---- states ----

@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_load_all_or_nothing(m, data):
    state = {k: t + 1 for k,t in m.state_dict().items()}
    before = copy.deepcopy(m.state_dict())
    key = data.draw(st.sampled_from(sorted(state)))
    broken = dict(state)
    kind = data.draw(st.sampled_from(['missing', 'unexpected', 'shape', 'kind', 'no tensor']))
    if kind=='missing': del broken[key]
    elif kind=='unexpected': broken['nobody.knows'] = torch.zeros(1)
    elif kind=='shape': broken[key] = torch.zeros(17)
    elif kind=='no tensor': broken[key] = data.draw(st.sampled_from([None, 'text', [1.], np.zeros(3)]))
    else: broken[key] = data.draw(st.sampled_from([lambda t: t.to(torch.complex64), lambda t: t.to('meta'), lambda t: t.to_sparse()]))(state[key])
    with pytest.raises(ValueError, match=f'{kind}: .*{"nobody" if kind=="unexpected" else key}'): m.load_state_dict(broken)
    for k,t in m.state_dict().items(): test_near(t, before[k], eps=0)
    m.load_state_dict(state)
    for k,t in m.state_dict().items(): test_near(t, before[k] + 1, eps=1e-6)

@pytest.mark.parametrize('own,given,fits', [
    (torch.float32, torch.float64, True), (torch.float32, torch.int64, True), (torch.bfloat16, torch.float32, True), (torch.int64, torch.int32, True),
    (torch.int64, torch.float32, False), (torch.bool, torch.int64, False), (torch.float32, torch.complex64, False)])
def test_numbers_of_another_kind(own, given, fits):
    m = Holds(first=Buffer(torch.zeros(2)), t=Buffer(torch.zeros(2, dtype=own)))
    state = {'first': torch.ones(2), 't': torch.ones(2, dtype=given)}
    if fits: assert m.load_state_dict(state).t.dtype==own and m.t.sum()==2
    else:
        with pytest.raises(ValueError, match=f'kind: t is {given}'): m.load_state_dict(state)
        assert m.first.sum()==0

def test_tied_tensors_with_two_values_load_nothing():
    w = Parameter(torch.zeros(2))
    for twin in (w, Parameter(w)):              # one object, or one memory
        m = Holds(first=Buffer(torch.zeros(1)), a=w, b=twin)
        state = {'first': torch.ones(1), 'a': torch.ones(2), 'b': torch.tensor([1., 2.])}
        with pytest.raises(ValueError, match='tied, but unequal: b'): m.load_state_dict(state)
        assert m.first.sum()==0 and w.sum()==0
        nan = torch.tensor([1., torch.nan])
        m.load_state_dict({**state, 'a': nan, 'b': nan.double()})           # equal, in another format and with a nan
        assert w[0]==1 and w[1].isnan()
        with torch.no_grad(): w.zero_()

def test_a_transposed_twin_is_no_contradiction():
    w = Parameter(torch.arange(4.).view(2,2))
    m = Holds(a=w, b=Parameter(w.T))
    state = copy.deepcopy(m.state_dict())
    with torch.no_grad(): w.zero_()
    m.load_state_dict(state)
    test_near(m.a, torch.arange(4.).view(2,2))

def test_a_state_that_shares_our_memory():
    "Two layers change their weights, and one is turned over: what is written must not be read again"
    m = Sequential(Linear(2, 2, bias=False), Linear(2, 2, bias=False))
    a,b = (layer.weight.detach().clone() for layer in m)
    state = m.state_dict()
    m.load_state_dict({'0.weight': state['1.weight'], '1.weight': state['0.weight'].T})
    test_near(m[0].weight, b, eps=0)
    test_near(m[1].weight, a.T, eps=0)

# ---- copies ----

@settings(max_examples=50, deadline=None)
@given(trees())
def test_copies_are_independent_and_keep_ties(m):
    sum(p.sum() for p in m.parameters()).backward() if list(m.parameters()) else None
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert [k for k,p in copied.named_parameters()]==[k for k,p in m.named_parameters()]
        assert len(list(copied.modules()))==len(list(m.modules()))
        assert not {id(t) for t in [*copied.parameters(), *copied.buffers()]} & {id(t) for t in [*m.parameters(), *m.buffers()]}
        for k,t in m.state_dict().items():
            test_near(copied.state_dict()[k], t, eps=0)
            assert not t.numel() or copied.state_dict()[k].data_ptr()!=t.data_ptr()
        for p,q in zip(copied.parameters(), m.parameters()):
            if p.grad is not None: p.grad.zero_()               # the copy's own gradient
            assert (q.grad==1).all()

def test_a_deep_copy_has_its_own_gradient():
    p = Parameter(torch.ones(3))
    (p*2).sum().backward()
    q = copy.deepcopy(p)
    test_near(q.grad, p.grad, eps=0)
    q.grad.add_(1)
    test_near(p.grad, torch.full((3,), 2.), eps=0)

# ---- what takes a part's place ----

@pytest.mark.parametrize('value,given', [(3., 'float'), (np.ones(2), 'ndarray'), ([1., 2.], 'list'), (torch.ones(2), r'plain tensor \(2,\)'), (torch.relu, 'builtin')])
def test_nothing_else_takes_a_parameters_place(value, given):
    m = Holds(w=Parameter(torch.ones(2)), theirs=torch.nn.Parameter(torch.ones(2)))
    for name in ('w', 'theirs'):
        with pytest.raises(TypeError, match=f'Holds.{name} is a Parameter, and a {given}.* would not be trained'): setattr(m, name, value)
    assert paths(m)==['w', 'theirs']
    m.w,m.theirs = None,Linear(2, 2, bias=False)
    assert paths(m)==['theirs.weight']

def test_nothing_but_a_tensor_takes_a_buffers_place():
    m = Holds(b=Buffer(torch.ones(2)), theirs=torch.nn.Buffer(torch.ones(2)))
    for name in ('b', 'theirs'):
        with pytest.raises(TypeError, match=f'Holds.{name} is a Buffer, and a float would not be saved'): setattr(m, name, 0.)
    assert list(m.state_dict())==['b', 'theirs']

@pytest.mark.parametrize('init', [kaiming_normal_, xavier_normal_])
@pytest.mark.parametrize('shape', [(5, 0), (0, 5), (5,), ()])
def test_weights_without_a_rule(init, shape):
    with pytest.raises(ValueError, match=f'{init.__name__}: got weights'): init(torch.empty(shape))

def test_hints_that_would_work():
    layers = OrderedDict(a=ReLU(), b=ReLU())
    with pytest.raises(TypeError, match=r'Sequential\(\*layers.values\(\)\)'): Sequential(layers)
    assert len(Sequential(*layers.values()))==2
    with pytest.raises(TypeError, match='register_forward_hook: got None'): ReLU().register_forward_hook(None)

# ---- Sequential ----

@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sequential_is_a_list(data):
    new = lambda: data.draw(st.sampled_from([lambda: Linear(2, 2), lambda: ReLU()]))()
    ours,plain = Sequential(),[]
    for _ in range(data.draw(st.integers(1, 8))):
        i = data.draw(st.integers(-len(plain), len(plain)))
        do = data.draw(st.sampled_from(['append', 'insert', 'extend', 'again'] + (['set', 'del', 'pop', 'reverse', 'cut'] if 0<=i<len(plain) else [])))
        layer = new()
        for o in (ours, plain):
            if do=='append': o.append(layer)
            elif do=='insert': o.insert(i, layer)
            elif do=='extend': o += [layer]
            elif do=='again' and len(o): o.append(o[0])
            elif do=='set': o[i] = layer
            elif do=='del': del o[i]
            elif do=='pop': o.pop()
            elif do=='reverse': o.reverse()
            elif do=='cut': del o[i:]
    assert len(ours)==len(plain) and all(a is b for a,b in zip(ours, plain)) and all(a is b for a,b in zip(ours[1:], plain[1:]))
    assert [name for name,_ in ours.named_children()]==[str(i) for i in range(len(plain))]
    theirs = torch.nn.Sequential(*[torch.nn.Linear(2, 2) if isinstance(o, Linear) else torch.nn.ReLU() for o in plain])
    assert set(ours.state_dict())==set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3,2)
    test_near(ours(x), theirs(x), eps=1e-5)

@pytest.mark.parametrize('do', [lambda s,o: s.append(o), lambda s,o: s.insert(0, o), lambda s,o: s.__setitem__(0, o), lambda s,o: s.extend([o])])
@pytest.mark.parametrize('layer', [torch.nn.ReLU(), torch.relu, [ReLU()], None])
def test_sequential_takes_modules_only(do, layer):
    s = Sequential(ReLU())
    with pytest.raises(TypeError, match='Sequential: layer . is a'): do(s, layer)
    assert len(s)==1

def test_attributes_of_a_sequential_are_parts_too():
    s = Sequential(Linear(2, 2, bias=False))
    s.scale,s.last = Parameter(torch.ones(1)),s[0]
    assert paths(s)==['scale', '0.weight'] and list(s.state_dict())==['scale', '0.weight', 'last.weight']

# ---- other people's tools ----

@pytest.mark.parametrize('opt', [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize('foreach', [False, True])
def test_torch_optimizers_step_parameters(opt, foreach):
    torch.manual_seed(0)
    ours,theirs = Sequential(Linear(4, 3), ReLU(), Linear(3, 1)),torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    ours.load_state_dict(theirs.state_dict())
    for net in (ours, theirs): net.to(torch.float64)            # Adam divides by small gradients: float32 would show its rounding
    x = torch.randn(8,4).double()
    for net in (ours, theirs):
        o = opt(net.parameters(), lr=0.01, foreach=foreach)
        for _ in range(5): o.zero_grad(); net(x).pow(2).mean().backward(); o.step()
    for p,q in zip(ours.parameters(), theirs.parameters()): test_near(p, q, eps=1e-6)

class Blocks(Module):
    "Layers in containers, torch.nn's parameters, an activation that is kept"
    def __init__(self):
        self.blocks = [[Linear(4, 3), ReLU()], {'last': Sequential(Flatten(), Linear(3, 2))}]
        self.scale,self.shift = torch.nn.Parameter(torch.ones(2)),Buffer(torch.ones(2))
    def forward(self, x):
        for layer in self.blocks[0]: x = layer(x)
        self.kept = x
        return self.blocks[1]['last'](x)*self.scale + self.shift

@pytest.mark.parametrize('training', [False, True])
def test_compiler_sees_through(training):
    "In one graph, outputs and gradients, on every torch that settings.ini allows"
    m,x = Blocks().train(training),torch.randn(5,4)
    other = copy.deepcopy(m)
    torch.compiler.reset()
    outs = torch.compile(m, backend='eager', fullgraph=True)(x),other(x)
    test_near(*outs, eps=1e-6)
    for out in outs: out.sum().backward()
    for p,q in zip(m.parameters(), other.parameters()): test_near(p.grad, q.grad, eps=1e-6)
    test_near(m.kept, other.kept, eps=1e-6)

def test_distributed_data_parallel_takes_our_modules(tmp_path):
    "DDP asks for modules, parameters without recurse, and buffers; with one process its gradients are the plain ones"
    torch.distributed.init_process_group('gloo', init_method=(tmp_path/'store').as_uri(), rank=0, world_size=1)
    try:
        m = Blocks()
        other,x = copy.deepcopy(m),torch.randn(5,4)
        ddp = torch.nn.parallel.DistributedDataParallel(m)
        for net in (ddp, other): net(x).sum().backward()
        for p,q in zip(m.parameters(), other.parameters()): test_near(p.grad, q.grad, eps=1e-6)
    finally: torch.distributed.destroy_process_group()

# ---- switches, hooks, errors ----

def test_freezing():
    m = Blocks().requires_grad_(False)
    assert not m(torch.ones(1,4)).requires_grad
    m.blocks[1]['last'].requires_grad_()
    m(torch.ones(1,4)).sum().backward()
    assert [path for path,p in m.named_parameters() if p.grad is not None]==['blocks.1.last.1.weight', 'blocks.1.last.1.bias']

@pytest.mark.parametrize('dtype', [torch.int64, torch.bool, torch.uint8])
def test_to_whole_numbers_is_refused_before_anything_moved(dtype):
    m = Holds(b=Buffer(torch.ones(1)), w=Parameter(torch.ones(1)))
    with pytest.raises(TypeError, match=str(dtype)): m.to(dtype)
    assert m.b.dtype==torch.float32

def test_hook_that_removes_itself():
    m,seen = Linear(2, 2),[]
    def once(module, inputs, output):
        seen.append(output)
        handle.remove()
    handle = m.register_forward_hook(once)
    for _ in range(3): m(torch.ones(1,2))
    handle.remove()
    assert len(seen)==1

def test_hooks_run_in_order_and_leave_with_their_block():
    m,seen = Linear(2, 2),[]
    with m.register_forward_hook(lambda *o: seen.append('a')), m.register_forward_hook(lambda *o: seen.append('b')): m(torch.ones(1,2))
    m(torch.ones(1,2))
    assert seen==['a', 'b']

def test_errors_keep_their_type_and_name_the_layers():
    m = Sequential(Linear(4, 3), Sequential(ReLU(), Linear(5, 1)))
    with pytest.raises(RuntimeError, match='cannot be multiplied') as e: m(torch.ones(2,4))
    assert e.value.__notes__==['in Linear(5, 1), called with (2, 3)', 'in Sequential(), called with (2, 3)', 'in Sequential(), called with (2, 4)']
    with pytest.raises(RuntimeError) as e: m(x=torch.ones(2,5))
    assert e.value.__notes__[-1]=='in Sequential(), called with (2, 5)'

@pytest.mark.parametrize('n', [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_sizes_may_be_anybodys_whole_numbers(n): assert repr(Linear(n, n))=='Linear(3, 3)  12 parameters'

@pytest.mark.parametrize('ni,says', [(True, 'ni is True'), (0, 'ni is 0'), (2.5, 'ni is 2.5'), ((28, 28), 'ni is'), (None, 'ni is None')])
def test_sizes_that_are_none(ni, says):
    with pytest.raises(ValueError, match=says): Linear(ni, 2)

def test_a_module_may_pass_unknown_names_on():
    class Wrap(Module):
        def __init__(self, inner): self.inner = inner
        def __getattr__(self, name):
            if name.startswith('__'): raise AttributeError(name)
            return getattr(self.inner, name)
    m = Wrap(Sequential(Linear(2, 2)))
    assert len(m.layers)==1 and paths(m)==['inner.0.weight', 'inner.0.bias']
