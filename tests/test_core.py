"Core's tools under inputs a chapter would not show: small images, odd numbers, an ASCII terminal, objects without source"
import functools, io, json, linecache, math, os, subprocess, sys, time
from unittest.mock import Mock, call, patch

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fractions import Fraction
from hypothesis import given, settings, strategies as st
from PIL import Image

from course_lib.core import *

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def python(code, cwd, **env):
    "What a fresh Python prints that runs `code` in the folder `cwd`"
    r = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, env={**os.environ, **env})
    assert r.returncode==0, r.stderr.decode()
    return r.stdout

def test_import_is_light(root):
    "Only gv needs graphviz, only expect tomllib, only the plots matplotlib"
    code = '''import sys, torch, numpy
before = set(sys.modules)
import course_lib.core
print(*set(sys.modules)-before)'''
    new = python(code, root).decode().split()
    assert not {'graphviz', 'tomllib', 'difflib', 'matplotlib', 'PIL', 'unittest.mock', 'IPython'} & set(new), new

# ---- pictures

def shown(im): return show_image(im).images[0].get_array()

@pytest.mark.parametrize('shape,as_tensor,as_array', [
    ((5,6), (5,6), (5,6)), ((1,5,6), (5,6), (5,6)), ((5,6,1), (5,6), (5,6)),
    ((3,5,6), (5,6,3), (5,6,3)), ((5,6,3), (5,6,3), (5,6,3)), ((4,5,6), (5,6,4), (5,6,4)),       # only one reading fits
    ((3,3,3), (3,3,3), (3,3,3)), ((3,4,4), (4,4,3), (3,4,4)), ((1,3,3), (3,3), (1,3,3)), ((3,1,1), (1,1,3), (3,1))])
def test_a_tensor_is_channels_first_and_an_array_channels_last(shape, as_tensor, as_array):
    x = torch.rand(shape)
    assert shown(x).shape==as_tensor and shown(x.numpy()).shape==as_array
    if len(shape)==3 and len(as_tensor)==3 and shape[0] in (3,4): assert np.array_equal(shown(x), x.permute(1,2,0).numpy())
    if len(as_array)==3 and shape[-1] in (3,4): assert np.array_equal(shown(x.numpy()), x.numpy())

def test_first_layer_filters_are_not_transposed():
    w = torch.nn.Conv2d(3, 16, 3).weight
    axs = show_images(w.sigmoid())
    for ax,o in zip(axs.flat, w.sigmoid()): assert np.array_equal(ax.images[0].get_array(), o.detach().permute(1,2,0).numpy())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize('shape', [(4,4), (3,4,4)])
def test_every_kind_of_number_is_shown(dtype, shape):
    x = (torch.rand(shape)>0.5).to(dtype)
    ax = show_image(x.requires_grad_() if dtype.is_floating_point else x)
    ax.figure.canvas.draw()
    assert np.array_equal(ax.images[0].get_array().astype(float), (x.permute(1,2,0) if len(shape)==3 else x).detach().double().numpy())

@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I;16', 'F'])
def test_images_of_pillow_show_what_they_are(mode):
    white_and_black = Image.fromarray(np.repeat(np.array([[255, 0]], np.uint8), 2, 0))
    im = white_and_black.convert('RGB').convert(mode) if mode!='I;16' else Image.fromarray(np.array([[65535, 0]]*2, np.uint16))
    a = np.asarray(shown(im), float)
    white,black = (a[0,i,:3].min() if a.ndim==3 else a[0,i] for i in (0,1))
    assert a.shape[:2]==(2,2) and white>=a[...,:3].max()*0.98>0 and black<=white*0.02

def test_images_have_a_frame_and_empty_places_none():
    axs = show_images(torch.ones(3,4,4), ncols=2)
    for ax in axs.flat[:3]:
        assert ax.axison and ax.spines['left'].get_visible() and ax.spines['left'].get_edgecolor()[:3]!=(1.,1.,1.)
        assert not len(ax.get_xticks()) and not len(ax.get_yticks())
    assert not axs[1,1].axison

@pytest.mark.parametrize('shape', [(), (7,), (2,5,6), (5,6,2), (1,1,5,6), (64,28,28), (0,5)])
def test_what_is_no_image_is_refused(shape):
    for x in (torch.zeros(shape), np.zeros(shape)):
        with pytest.raises(ValueError, match=r'show_image: got shape \(' + ', '.join(map(str, shape))): show_image(x)

def test_plot_function_takes_what_functions_return():
    for f in (torch.sin, lambda x: x.numpy()**2, lambda x: x.bfloat16(), lambda x: (x>0), lambda x: x*torch.ones(1, requires_grad=True)):
        assert len(plot_function(f, n=9).lines[0].get_ydata())==9
    with pytest.raises(ValueError, match='one number for each'): plot_function(lambda x: 1.)

# ---- diagrams

def test_diagram_without_dot_is_its_words(root):
    code = '''import os
os.environ['PATH'] = ''
from course_lib.core import gv
print(gv('a -> "b c" [label="twice"]')._repr_mimebundle_())'''
    assert b'a -> "b c" [label="twice"]' in (out := python(code, root)) and b'install graphviz' in out

def test_diagram_is_drawn_by_graphviz():
    with patch('graphviz.Source._repr_mimebundle_', lambda self, *args, **kwargs: {'source': self.source}):
        source = gv('a -> b', rankdir='TB')._repr_mimebundle_()['source']
    assert source.startswith('digraph {') and 'rankdir="TB"' in source and 'a -> b' in source

# ---- source

def printed(f, *args, **kwargs):
    with patch('sys.stdout', io.StringIO()) as s: f(*args, **kwargs)
    return s.getvalue()

def plain(x): return 'plain me'

class Layer:
    "A class with a method called func"
    def func(self): return 'func me'
    @property
    def size(self): return 'size me'
    @functools.cached_property
    def depth(self): return 'depth me'
    @staticmethod
    def alone(): return 'alone me'
    @classmethod
    def of_class(cls): return 'of_class me'
    half = functools.partialmethod(plain)

@pytest.mark.parametrize('obj,text', [
    (plain, 'plain me'), (functools.partial(functools.partial(plain, 1)), 'plain me'), (functools.lru_cache(plain), 'plain me'),
    (property(functools.partial(plain)), 'plain me'), (vars(Layer)['half'], 'plain me'), (Layer.size, 'size me'), (Layer.depth, 'depth me'),
    (Layer.alone, 'alone me'), (Layer.of_class, 'of_class me'), (vars(Layer)['of_class'], 'of_class me'), (Layer().func, 'func me'),
    (Layer, 'A class with a method called func'), (sys.modules[__name__], 'def plain')])
def test_source_is_found(obj, text):
    out = printed(print_source, obj)
    assert out.startswith('# tests/test_core.py, line ') and text in out

def test_source_of_a_frozen_module():
    "Python starts with some of its modules frozen; their text is in its library all the same"
    assert 'def walk(top' in printed(print_source, os.walk)

@pytest.mark.timeout(20)
@pytest.mark.parametrize('obj', [Mock(), Mock(spec=plain), Mock(spec=property), Mock(spec=functools.partial), call, 3, torch.ones(2), None,
                                 Layer(), torch.add, math.sin, int, torch.Tensor.add, property()])
def test_what_has_no_source_says_so(obj):
    with pytest.raises(TypeError, match='print_source: .* has no Python source'): print_source(obj)

def test_reason_is_the_true_one():
    space = {'__name__': '__main__'}
    exec('def f(): pass\nclass C:\n    def g(self): pass\nclass D: pass', space)
    for name in 'fCD':
        with pytest.raises(TypeError, match=f'{name} has no Python source; Python kept no text of it'): print_source(space[name])
    for obj in (torch.add, int, 3):
        with pytest.raises(TypeError, match='it is compiled'): print_source(obj)

CELL = '''import functools
class Other:
    def g(self): return 'not me'
def decorate(cls): return cls
class Outer:
    @decorate
    class Inner:
        @property
        def g(self): return 'inner me'
    def h(self): return 'outer me'
'''
@pytest.mark.parametrize('name,line,last', [('Other', 2, "return 'not me'"), ('Outer', 5, "return 'outer me'"), ('Outer.Inner', 6, "return 'inner me'")])
def test_class_of_a_notebook_is_found_in_its_cell(name, line, last, monkeypatch):
    "As IPython does it: each cell's text is kept in linecache under a made-up name"
    space,file = {'__name__': '__main__'},'/tmp/ipykernel_1/2.py'
    monkeypatch.setitem(linecache.cache, file, (len(CELL), None, CELL.splitlines(True), file))
    exec(compile(CELL, file, 'exec'), space)
    out = printed(print_source, functools.reduce(getattr, name.split('.')[1:], space[name.split('.')[0]]))
    assert out.startswith(f'# a cell of this notebook, line {line}\n') and out.endswith(last+'\n')

# ---- an output that is not UTF-8

@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp437', 'utf-8'])
def test_what_cannot_be_written_is_replaced(root, encoding):
    code = '''from course_lib.core import *
def f(): return "→ é 漢"
expect('00_core.sum_to_100', 5050)
expect('01_datasets.split_sizes', [50000, 10000, 10000])
with show_error(): raise ValueError("→ é 漢")
exec(compile('def g(): return "→"', 'none', 'exec'))
import linecache; linecache.cache['none'] = (1, None, ['def g(): return "→"'], 'none')
print_source(g)'''
    out = python(code, root, PYTHONIOENCODING=encoding).decode(encoding)
    arrow = '→' if encoding=='utf-8' else '?'
    assert f'ValueError: {arrow} ' in out and f'return "{arrow}"' in out and 'yours 5,050' in out

def test_no_output_at_all_does_no_harm(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    with show_error(): raise ValueError('nobody hears this')

# ---- numbers

dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), dtypes, dtypes, st.sampled_from([0., 1e-5, 1., 2.5]), st.sampled_from([0., 0.3]))
def test_near_agrees_with_numpy(pairs, s, t, eps, rel):
    a,b = (torch.tensor(o).to(d) for o,d in zip(zip(*pairs), (s, t)))
    wide = [o.to(torch.complex128).numpy() for o in (a,b)]
    if np.allclose(*wide, atol=eps, rtol=rel): test_near(a, b, eps=eps, rel=rel)
    else:
        with pytest.raises(AssertionError, match='differ by more than'): test_near(a, b, eps=eps, rel=rel)

nan,inf = math.nan,math.inf
@pytest.mark.parametrize('a,b,kwargs', [
    (1+2j, 1+5j, {}), (torch.tensor(1+2j), 1, {}), (2**53+1, 2**53, {}), (2**63-1, 2**63-2, {}), (torch.tensor(2**24+1), torch.tensor(2.**24), {}),
    (torch.tensor(2**24+1, dtype=torch.int32), 2**24, {}), (torch.tensor([0], dtype=torch.uint8), [255], dict(eps=2)),
    (True, False, {}), (1., inf, dict(rel=1.)), (inf, -inf, {}), (inf, 1., dict(rel=1.)), (nan, 1., {}), (1., nan, dict(eps=9)), (complex(1, nan), 1+0j, {})])
def test_different_numbers_are_not_near(a, b, kwargs):
    with pytest.raises(AssertionError, match='is not'): test_near(a, b, **kwargs)

@pytest.mark.parametrize('a,b,kwargs', [
    (1+2j, 1+2j, {}), (2**53+1, 2**53+1, {}), (2**53+1, 2**53, dict(eps=1)), (torch.ones(2), [1, 1], {}), (True, 1, {}), (nan, nan, {}), (inf, inf, dict(rel=1.)),
    (torch.ones(2).bfloat16(), np.ones(2), {}), (100, 101, dict(rel=0.01)), ([], [], {}), (torch.ones(2, requires_grad=True), 1+torch.zeros(2), {})])
def test_equal_numbers_are_near(a, b, kwargs): test_near(a, b, **kwargs)

@pytest.mark.filterwarnings('error')
def test_near_takes_arrays_as_they_come():
    a = np.arange(4.)
    test_near(a[::-1], [3, 2, 1, 0])        # strides below 0
    a.flags.writeable = False
    test_near(a, torch.arange(4))

def test_near_tells_shape_value_and_place():
    with pytest.raises(AssertionError, match=r'shapes differ, \(2, 1\) and \(2,\)'): test_near(torch.ones(2,1), torch.ones(2))
    with pytest.raises(AssertionError, match=r'3 is not 3.5 at \(1, 0\); 2 of 4 differ by more than 0.1 \+ 0.01\*\|b\|'):
        test_near([[1., 2.], [3., 4.]], [[1., 2.], [3.5, 5.]], eps=0.1, rel=0.01)

@pytest.mark.parametrize('seed', [np.int64(3), np.uint8(3), torch.tensor(3), 3])
def test_a_seed_is_any_whole_number(seed):
    set_seed(3); wanted = torch.rand(2),np.random.rand()
    set_seed(seed)
    assert torch.equal(torch.rand(2), wanted[0]) and np.random.rand()==wanted[1]

@pytest.mark.parametrize('seed', [True, -1, 2**32, 2.5, '3', None, nan])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match='set_seed: seed is .* a whole number of at least 0 and below 4294967296 is wanted'): set_seed(seed)

@pytest.mark.parametrize('value', [nan, inf, -inf, np.float32(nan), np.float64(inf), torch.tensor(inf), np.array(-inf)])
def test_a_finite_number_is_asked_for(value):
    for bounds,wanted in (({}, 'a number'), (dict(above=0), 'a number above 0'), (dict(least=1, whole=True), 'a whole number of at least 1')):
        with pytest.raises(ValueError, match=f'f: lr is .*, but {wanted} is wanted, and a finite one$'): check_number('f', 'lr', value, **bounds)

def test_other_values_are_not_told_to_be_finite():
    for value in (None, 'a', 1j, True, [1], -1, -10**400):
        with pytest.raises(ValueError, match='is wanted$'): check_number('f', 'lr', value, above=0)
    assert check_number('f', 'n', 10**400, whole=True)==10**400 and check_number('f', 'p', Fraction(1, 2))==0.5

# ---- times and results

class Clock:
    "A clock that moves only when somebody works, so that no test depends on a machine"
    def __init__(self, monkeypatch):
        self.now,self.calls = 0,[]
        monkeypatch.setattr(time, 'perf_counter', lambda: self.now)
    def work(self, name, seconds):
        self.calls.append(name)
        self.now += seconds

def test_best_time_takes_turns_and_keeps_the_best(monkeypatch):
    clock,delays = Clock(monkeypatch),iter([30, 0, 0, 30, 0, 0])        # the first call and the fourth are disturbed
    times = best_time(lambda: clock.work('a', 5 + next(delays)), lambda: clock.work('b', 7 + next(delays)), n=3)
    assert clock.calls==list('ababab') and times==[5, 7]
    assert len(best_time(lambda: None))==1

def test_best_time_is_for_one_call(monkeypatch):
    clock = Clock(monkeypatch)
    assert best_time(lambda: clock.work('a', 4), n=2, number=6)==[4] and len(clock.calls)==12

@pytest.mark.parametrize('kwargs,says', [(dict(n=0), 'n is 0'), (dict(number=0), 'number is 0'), (dict(n=True), 'n is True'), (dict(number=2.5), 'number is 2.5')])
def test_best_time_wants_counts(kwargs, says):
    with pytest.raises(ValueError, match=f'best_time: {says}'): best_time(lambda: None, **kwargs)

@pytest.fixture
def ledger(tmp_path, monkeypatch):
    "A ledger of this test, as nbs/ledger.toml of the folder above the current one; returns where results go"
    (tmp_path/'nbs'/'deeper').mkdir(parents=True)
    (tmp_path/'nbs'/'ledger.toml').write_text('''[a]
acc = {expected = 0.98, tol = 0.01, seeds = 5, source = "s"}
accs = {expected = [0.5, 0.25], source = "s"}
n = {expected = 3, source = "s"}
name = {expected = "three", source = "s"}''')
    monkeypatch.chdir(tmp_path/'nbs'/'deeper')
    monkeypatch.setenv('COURSE_RESULTS', str(tmp_path/'results'))
    return tmp_path/'results'

@pytest.mark.parametrize('key,value,kept', [
    ('acc', 0.971, 0.971), ('acc', np.float64(0.98), 0.98), ('acc', torch.tensor(0.5)+0.48, None), ('n', np.int64(3), 3), ('n', 3., 3.), ('name', 'three', 'three'),
    ('accs', [torch.tensor(0.5), np.float32(0.25)], [0.5, 0.25]), ('accs', (0.5, 0.25), [0.5, 0.25]), ('accs', np.array([0.5, 0.25]), [0.5, 0.25])])
def test_results_are_taken_in_every_form_and_passed_on(ledger, key, value, kept):
    expect(f'a.{key}', value)
    row = json.loads(ledger.read_text())
    assert row['key']==f'a.{key}' and (kept is None or row['value']==kept)
    assert row['expected']=={'acc': '0.9800 ± 0.01', 'accs': '0.5000 0.2500', 'n': '3', 'name': 'three'}[key]

@pytest.mark.parametrize('key,value', [('acc', 0.9), ('acc', nan), ('acc', inf), ('acc', None), ('acc', '0.98'), ('acc', [0.98]), ('acc', 1j), ('n', 4), ('n', '3'),
                                       ('name', 3), ('accs', [0.5]), ('accs', [0.25, 0.5]), ('accs', 0.5), ('accs', [0.5, None])])
def test_other_results_are_refused_and_not_passed_on(ledger, key, value):
    with pytest.raises(AssertionError, match=f'a.{key}: .* came out, but'): expect(f'a.{key}', value)
    assert not ledger.exists()

@pytest.mark.parametrize('key,value,told', [('n', torch.tensor([3]), '[3] came out, but 3 was'), ('n', '3', "'3' came out, but 3 was"), ('acc', [0.98], '[0.98] came out, but 0.98 was')])
def test_a_result_of_another_shape_says_so(ledger, key, value, told):
    with pytest.raises(AssertionError) as e: expect(f'a.{key}', value)
    assert told in str(e.value)

def test_a_missing_row_names_those_there_are(ledger):
    with pytest.raises(KeyError, match='there are acc, accs, n, name'): expect('a.acs', 1)
    with pytest.raises(KeyError, match='there are a'): expect('b.acc', 1)
